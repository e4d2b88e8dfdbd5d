"""What is asked of an architecture. A check raises where the answer is no; its sentence goes into the table."""

import copy
import tempfile
from collections.abc import Callable

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
from torch import nn

import loralib as lora
from loralib.model import lora_layers

from .models import ROWS, Architecture

R = 4
RANKS = torch.tensor([1, 4, 2])
EXACT = dict(atol=2e-5, rtol=2e-4)


class No(Exception):
    """The answer no, in a sentence."""


class Missing(Exception):
    """The architecture has no such thing."""


def same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    if not torch.allclose(got, wanted, **EXACT):
        raise No(f"{what} differs by {float((got - wanted).abs().max()):.2g}.")


@torch.no_grad()
def out(model: nn.Module, batch: dict, rank=None) -> torch.Tensor:
    """Logits, or the mean of the last hidden states."""
    if rank is not None:
        lora.set_rank(model, rank)
    found = model(**batch)
    logits = getattr(found, "logits", None)
    return found.last_hidden_state.mean(1) if logits is None else logits


class Case:
    """One architecture with one choice of layers."""

    def __init__(self, architecture: Architecture, targets: str):
        self.architecture, self.targets = architecture, targets
        self.batch = architecture.batch()
        self.stock = architecture.build()
        self.adapted = self._adapt()

    def _adapt(self) -> nn.Module:
        model = self.architecture.build()
        if self.targets == "usual" and model.config.model_type not in USUAL:
            raise Missing
        where = {"usual": None, "all-linear": "all-linear"}.get(self.targets, [])
        lora.inject(model, self._word_embeddings() if where == [] else where, r=R, lora_alpha=8)
        generator = torch.Generator().manual_seed(1)
        for _, layer in lora_layers(model):
            for factor in (layer.lora_A, layer.lora_B):
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
        return model.eval()

    def _word_embeddings(self) -> list[str]:
        """The embeddings with the input embedding's weight that a pass calls; several where it is shared."""
        try:
            weight, called = self.stock.get_input_embeddings().weight, []
        except (NotImplementedError, AttributeError):  # an image or a sound is not looked up
            raise Missing from None
        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
            for name, module in self.stock.named_modules()
            if isinstance(module, nn.Embedding) and module.weight is weight
        ]
        if not hooks:
            raise Missing
        out(self.stock, self.batch)
        for hook in hooks:
            hook.remove()
        return called

    # --- the checks, in the table's order -----------------------------------------------------------

    def ranks(self) -> None:
        """Rank 0 is the base model, and every rank is a model of its own."""
        outputs = [out(self.adapted, self.batch, b) for b in range(R + 1)]
        same(outputs[0], out(self.stock, self.batch), "rank 0 and the base model:")
        for b in range(R):
            if torch.allclose(outputs[b], outputs[b + 1], **EXACT):
                raise No(f"ranks {b} and {b + 1} give the same.")

    def per_example(self) -> None:
        """One rank per example gives each what it gets alone at its rank."""
        got = out(self.adapted, self.batch, RANKS)
        for i, b in enumerate(RANKS.tolist()):
            alone = {key: value[i : i + 1] for key, value in self.batch.items()}
            same(got[i], out(self.adapted, alone, b)[0], f"an example at rank {b} beside others and alone:")

    def export(self) -> None:
        """Stock PEFT loads the adapter cut to 1 and to r_max, and computes the same."""
        from peft import PeftModel

        for b in (1, R):
            with tempfile.TemporaryDirectory() as directory:
                lora.save_adapter(self.adapted, directory, rank=b)
                theirs = PeftModel.from_pretrained(copy.deepcopy(self.stock), directory).eval()
            same(out(theirs, self.batch), out(self.adapted, self.batch, b), f"stock PEFT at rank {b}:")

    def merge(self) -> None:
        """The merged model is plain and computes the same."""
        merged = lora.merge(self.adapted, rank=2)
        if any("lora_" in name for name, _ in merged.named_parameters()):
            raise No("the merged model still has an adapter.")
        same(out(merged, self.batch), out(self.adapted, self.batch, 2), "the merged model:")

    def reload(self) -> None:
        """What was saved loads into a fresh model."""
        with tempfile.TemporaryDirectory() as directory:
            lora.save_adapter(self.adapted, directory)
            fresh = self.architecture.build()
            lora.load_adapter(fresh, directory)
        for b in (1, R):
            same(out(fresh.eval(), self.batch, b), out(self.adapted, self.batch, b), f"reloaded, rank {b}:")

    def order(self) -> None:
        """Ordering leaves r_max as it was, and brings rank 1 nearer to it in every layer."""
        model = copy.deepcopy(self.adapted)
        before = out(model, self.batch, R)
        far = self._distances(model)
        lora.order_components(model)
        same(out(model, self.batch, R), before, "r_max after ordering:")
        if any(near > was * 1.001 for near, was in zip(self._distances(model), far, strict=True)):
            raise No("rank 1 is farther from r_max after ordering.")

    @staticmethod
    def _distances(model: nn.Module) -> list[float]:
        """How far each layer's update at rank 1 is from that at r_max."""
        found = []
        for _, layer in lora_layers(model):
            updates = []
            for b in (1, layer.r):
                layer.set_rank(b)
                updates.append(layer.delta_weight().detach())
            found.append(float((updates[1] - updates[0]).norm()))
        return found

    def generate(self) -> None:
        """Greedy tokens at one rank per sequence are those of the merged models."""
        if not self.architecture.generates:
            raise Missing
        prompt = {key: value for key, value in self.batch.items() if not key.startswith("decoder_")}
        options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
        lora.set_rank(self.adapted, RANKS)
        got = self.adapted.generate(**prompt, **options)
        for i, b in enumerate(RANKS.tolist()):
            alone = {key: value[i : i + 1] for key, value in prompt.items()}
            wanted = lora.merge(self.adapted, rank=b).generate(**alone, **options)
            if not torch.equal(got[i : i + 1], wanted):
                raise No(f"the tokens at rank {b} are not the merged model's.")

    def checkpointing(self) -> None:
        """Gradients at one rank per example are the same with activation checkpointing."""
        found = []
        for on in (False, True):
            model = copy.deepcopy(self.adapted).train()
            for module in model.modules():  # no two passes would be alike
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if on:
                if not getattr(model, "supports_gradient_checkpointing", False):
                    raise Missing
                options = {"use_reentrant": False, "context_fn": lora.checkpoint_contexts(model)}
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            lora.mark_only_lora_as_trainable(model)
            lora.set_rank(model, RANKS)
            torch.manual_seed(0)
            output = model(**self.batch)
            logits = getattr(output, "logits", None)
            (output.last_hidden_state if logits is None else logits).square().mean().backward()
            lora.set_rank(model, 1)  # what a backward pass must not be misled by
            found.append(
                [layer.lora_B.grad.clone() for _, layer in lora_layers(model) if layer.lora_B.grad is not None]
            )
        if not found[0]:
            raise No("no layer got a gradient.")
        for plain, checkpointed in zip(*found, strict=True):
            same(checkpointed, plain, "a gradient under checkpointing:")


CHECKS: dict[str, Callable[[Case], None]] = {
    "ranks": Case.ranks,
    "a rank per example": Case.per_example,
    "export to PEFT": Case.export,
    "merge": Case.merge,
    "reload": Case.reload,
    "order": Case.order,
    "generate": Case.generate,
    "checkpointing": Case.checkpointing,
}
TARGETS = ("usual", "all-linear", "embeddings")
assert len(RANKS) == ROWS
