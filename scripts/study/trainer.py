"""The trainer of the study: the library's, with the variants of a ``Method``, none of which the library has."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import loralib as lora
from loralib.model import lora_layers
from loralib.momenta import SQUARE, kept_for
from loralib.schedule import Setting
from loralib.trainer import DyLoRATrainer

from .methods import Method


def even_draw(weights, n: int, seed: str) -> torch.Tensor:
    """n ranks, rank b about n * weights[b - 1] / sum(weights) times, at most one more or less; their order is
    random."""
    import random

    draw = random.Random(seed)
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64) + draw.random()) / n * edges[-1]
    ranks = (torch.searchsorted(edges, points, right=True) + 1).clamp(max=len(weights)).tolist()
    draw.shuffle(ranks)
    return torch.tensor(ranks)


@dataclass(frozen=True)
class AtStrengths(Setting):
    """Ranks whose components have strengths of their own, whatever the rank."""

    strengths: tuple[float, ...] = ()

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().apply(model, optimizer)
        if self.strengths:
            lora.set_gate(
                model, (torch.arange(len(self.strengths)) < self.rank[:, None]) * torch.tensor(self.strengths)
            )


@dataclass(frozen=True)
class AtPaces(Setting):
    """Ranks whose components learn at paces of their own: component k has ``faster[k]`` times the strength and at the
    ordering a lora_B that is smaller by as much, so that the update is the same and a step of Adam moves it more."""

    faster: tuple[float, ...] = ()
    strength: float = 1.0

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().apply(model, optimizer)
        paces = torch.tensor(self.faster)
        if self.order:
            fold(model, optimizer, 1 / paces)
        ranks = self.rank
        weights = ranks if ranks.is_floating_point() else F.one_hot(ranks - 1, len(paces)).float()
        gates = weights.flip(1).cumsum(1).flip(1)  # component k takes part at the ranks from k on
        lora.set_gate(model, gates * paces * self.strength)


@dataclass(frozen=True)
class Skewed(Setting):
    """r_max, with components of different strengths up to the ordering, where these become part of lora_B."""

    factors: tuple[float, ...] = ()
    strength: float = 1.0

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        factors = torch.tensor(self.factors)
        if self.order:
            fold(model, optimizer, factors)
        super().apply(model, optimizer)
        if not self.order:
            lora.set_gate(model, factors * self.strength)


@dataclass(frozen=True)
class Stretched(Setting):
    """Components whose rows of lora_A are longer from the ordering on, and whose columns of lora_B are shorter by as
    much: the update is the same, and a step of Adam on lora_B moves it more."""

    factors: tuple[float, ...] = ()

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().apply(model, optimizer)
        factors = torch.tensor(self.factors)
        fold(model, optimizer, 1 / factors)
        fold(model, optimizer, factors[:, None], "lora_A")


@torch.no_grad()
def fold(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, factors: torch.Tensor, name: str = "lora_B"
) -> None:
    """Multiply the components of each factor by ``factors``, momenta along; of models with plain layers alone."""
    for _, layer in lora_layers(model):
        factor = getattr(layer, name)
        factor *= factors
        for kept in [] if optimizer is None else kept_for(optimizer, factor):
            kept.write(kept.read() / (factors.square() if kept.follows == SQUARE else factors))


class StudyTrainer(DyLoRATrainer):
    """DyLoRATrainer with the variants of a ``Method``."""

    def __init__(self, method: Method, **options):
        super().__init__(
            schedule=method.schedule, eval_ranks=method.ranks, group_by_length=method.group_by_length, **options
        )
        self.method = method
        if method.orthogonal:
            for _, layer in lora_layers(self.model):
                length = layer.lora_A.detach().norm() / layer.r**0.5
                nn.init.orthogonal_(layer.lora_A, gain=float(length))
        if method.lengths:
            self.lengthen(self.model, torch.tensor(method.lengths))
        if method.wide_A:
            self.widen(self.model)
        self.groups: list[tuple[float, dict[int, float]]] = []  # the tail, settled at the ordering

    @staticmethod
    @torch.no_grad()
    def lengthen(model: nn.Module, lengths: torch.Tensor) -> None:
        """Rows of lora_A of lengths of their own; of models with plain layers alone."""
        for _, layer in lora_layers(model):
            layer.lora_A *= lengths[:, None]

    @staticmethod
    @torch.no_grad()
    def widen(model: nn.Module) -> None:
        """lora_A as if drawn with a bound of 1/sqrt(r) in place of 1/sqrt(in)."""
        for _, layer in lora_layers(model):
            layer.lora_A *= (layer.lora_A.shape[1] / layer.r) ** 0.5

    def draws_by_now(self) -> bool:
        """Whether the part at r_max is over."""
        return self.state.global_step >= self.bound.full_steps

    def steps_of(self, shares: tuple[float, ...]) -> list[int]:
        """The updates before which these shares of the training are over."""
        return [round(share * self.state.max_steps) for share in shares]

    def training_setting(self, batch_size: int) -> Setting:
        setting, method = super().training_setting(batch_size), self.method
        if method.skew and (setting.order or not self.draws_by_now()):
            return Skewed(setting.rank, order=setting.order, factors=method.skew, strength=method.strength)
        if not self.draws_by_now():
            return setting
        if self.place.micro == 0 and self.state.global_step in self.steps_of(method.again):
            setting = replace(setting, order=True)
        if method.gate_after:
            return replace(setting, gate_ranks=method.gate_after, reduce="mean")
        if method.tail:
            if setting.order or not self.groups:
                self.groups = [*method.tail, *self.groups_by_cost(setting.order)]
            setting = Setting(self.group_weights(), order=setting.order)
        if method.stretch and setting.order:
            return Stretched(setting.rank, order=True, factors=method.stretch)
        if method.weights:
            return AtStrengths(
                self.even_ranks(), order=setting.order, strengths=method.strengths, paces=method.learn or None
            )
        if method.paces:
            return AtPaces(setting.rank, order=setting.order, faster=method.paces, strength=method.strength)
        return setting

    def groups_by_cost(self, order: bool) -> list[tuple[float, dict[int, float]]]:
        """Ranks below r_max, each with a share in proportion to its loss above that of r_max, on a few training
        batches."""
        if not self.method.by_cost:
            return []
        if order:
            lora.order_components(
                self.model, self.optimizer
            )  # again by the setting: of what is ordered nothing changes
        losses = dict.fromkeys((1, 2, 4, 8), 0.0)
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for _, batch in zip(
                range(8),
                super().get_eval_dataloader(self.train_dataset.select(range(min(512, len(self.train_dataset))))),
                strict=False,
            ):
                for b, output in lora.at_ranks(self.model, batch, list(losses)):
                    losses[b] += float(output.loss)
        self.model.train(training)
        cost = {b: max(loss - losses[8], 1e-9) for b, loss in losses.items() if b != 8}
        return [(self.method.by_cost * value / sum(cost.values()), {b: 1.0}) for b, value in cost.items()]

    def group_weights(self) -> torch.Tensor:
        """The micro-batch's part of the update's examples, each with its group's weights of ranks."""
        rows = torch.zeros(len(self.groups), self.method.r)
        for row, (_, weights) in zip(rows, self.groups, strict=True):
            for b, weight in weights.items():
                row[b - 1] = weight
        shares = [share for share, _ in self.groups]
        if self.method.tail_end:
            first, last = self.bound.full_steps, self.state.max_steps
            done = (self.state.global_step - first) / max(1, last - 1 - first)
            shares = [a + done * (b - a) for a, b in zip(shares, self.method.tail_end, strict=True)]
        drawn = even_draw(shares, self.place.size(0), f"{self.args.seed}:{self.state.global_step}")
        return rows[drawn - 1][list(self.place.places())]

    def even_ranks(self) -> torch.Tensor:
        """The micro-batch's part of the even draw for the update."""
        weights, step = list(self.method.weights), self.state.global_step
        if step < self.method.rank_1_first * self.state.max_steps:
            weights = [1.0] + [0.0] * (len(weights) - 1)
        if self.method.anneal:
            share = min(1.0, 2 * step / self.state.max_steps)
            weights = [w * share for w in weights[:-1]] + [weights[-1] + (1 - share) * sum(weights[:-1])]
        return even_draw(weights, self.place.size(0), f"{self.args.seed}:{step}")[list(self.place.places())]

    def train(self, *args, **kwargs):
        """As the library's; then own strengths of the components become part of lora_B."""
        output = super().train(*args, **kwargs)
        if self.method.paces:
            fold(self.model, None, torch.tensor(self.method.paces))
        if self.method.strengths:
            with torch.no_grad():
                for _, layer in lora_layers(self.model):
                    layer.lora_B *= torch.tensor(self.method.strengths) / layer.strength()
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.method.distil and self.draws_by_now():
            with torch.no_grad(), lora.use_rank(model, self.method.r):
                full = super().compute_loss(model, inputs, True, num_items_in_batch)[1].logits
            own = F.log_softmax(outputs.logits.float(), -1)
            loss = loss + self.method.distil * F.kl_div(
                own, F.log_softmax(full.float(), -1), log_target=True, reduction="batchmean"
            )
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args, **kwargs):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.method.rate_B != 1:
            B = {id(p) for name, p in self.model.named_parameters() if name.endswith("lora_B")}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in B]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in B]
                    optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * self.method.rate_B})
        return optimizer
