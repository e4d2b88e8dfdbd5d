"""Components at paces of their own: the optimizer at other learning rates, and, under Adam, other strengths."""

import bitsandbytes as bnb
import pytest
import schedulefree
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.pacing import paces_of, usual_paces

PACES = [4.0, 2.0, 1.0, 0.5]
OPTIMIZERS = {
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr, d=1e9, beta2_decay=-1.0),
}


class OnGrid(nn.Module):
    """A layer of each kind, on its own input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                "linear": lora.Linear(6, 5, r=4),
                "merged": lora.MergedLinear(6, 9, r=4, enable_lora=[True, False, True]),
                "convolution": lora.Conv2d(2, 3, 3, r=4),
                "embedding": lora.Embedding(7, 5, r=4),
            }
        )
        for layer in self.layers.values():
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs = {
            "linear": torch.randn(3, 6, generator=generator),
            "merged": torch.randn(3, 6, generator=generator),
            "convolution": torch.randn(3, 2, 4, 4, generator=generator),
            "embedding": torch.randint(7, (3, 2), generator=generator),
        }
        return sum(layer(inputs[name]).square().sum() for name, layer in self.layers.items())

    def from_zero(self, name):
        """The factor that starts at zero, with the component last."""
        layer = self.layers[name]
        return layer.lora_A.T if name == "embedding" else layer.split_B(layer.lora_B).transpose(1, 2)


def one_step(model, optimizer, step):
    optimizer.zero_grad()
    model.loss(step).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_optimizer_at_other_learning_rates(name):
    """Each component of the factor from zero moves as under the optimizer at its own rate, the other factor as ever."""
    lr = 1e-3
    for k, pace in enumerate(PACES):
        paced, plain = OnGrid(), OnGrid()
        optimizer = OPTIMIZERS[name](paced.parameters(), lr)
        lora.pace_components(optimizer, paced, PACES)
        one_step(paced, optimizer, 0)
        one_step(plain, OPTIMIZERS[name](plain.parameters(), lr * pace), 0)
        for layer in paced.layers:
            torch.testing.assert_close(paced.from_zero(layer)[..., k], plain.from_zero(layer)[..., k])
    usual = OnGrid()
    one_step(usual, OPTIMIZERS[name](usual.parameters(), lr), 0)
    for layer in paced.layers:
        other = "lora_B" if layer == "embedding" else "lora_A"
        assert torch.equal(getattr(paced.layers[layer], other), getattr(usual.layers[layer], other))


def test_under_adam_a_pace_is_a_strength():
    """Component k paces[k] times as fast learns the update of one whose strength is paces[k] times as high."""
    x, models = torch.randn(20, 3, 6), []
    for paced in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(lora.Linear(6, 6, r=4, lora_alpha=4, scaling="alpha/r"))
        optimizer = torch.optim.Adam([model[0].lora_A, model[0].lora_B], lr=1e-2, eps=1e-30)
        if paced:
            lora.pace_components(optimizer, model, PACES)
        else:
            lora.set_gate(model, torch.tensor(PACES))
        for batch in x:
            optimizer.zero_grad()
            (model(batch) - batch.roll(1, -1)).square().mean().backward()
            optimizer.step()
        models.append(model)
    paced, strong = models
    torch.testing.assert_close(paced(x[0]), strong(x[0]))
    torch.testing.assert_close(paced[0].lora_B, strong[0].lora_B * torch.tensor(PACES))


def test_a_step_with_a_closure_and_one_that_the_scaler_skips():
    model = OnGrid()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lora.pace_components(optimizer, model, PACES)
    plain = OnGrid()
    one_step(plain, torch.optim.SGD(plain.parameters(), lr=1e-3), 0)
    start = OnGrid().from_zero("linear").detach()

    def closure():
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = plain.from_zero("linear") - start
    torch.testing.assert_close(model.from_zero("linear") - start, moved * torch.tensor(PACES))
    before = model.from_zero("linear").detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model.loss(1) * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(model.from_zero("linear"), before)


def test_an_optimizer_that_accelerate_has_wrapped():
    from accelerate import Accelerator

    model, plain = OnGrid(), OnGrid()
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD(model.parameters(), lr=1e-3))
    lora.pace_components(optimizer, model, [2.0] * 4)
    one_step(model, optimizer, 0)
    one_step(plain, torch.optim.SGD(plain.parameters(), lr=2e-3), 0)
    torch.testing.assert_close(model.from_zero("merged"), plain.from_zero("merged"))


@pytest.mark.parametrize("paces", [[1.0] * 3, [1.0] * 5, [1.0, 1.0, 0.0, 1.0], [1.0, float("nan"), 1.0, 1.0]])
def test_paces_that_are_none(paces):
    model = OnGrid()
    with pytest.raises(ValueError, match="give a number above 0 for each of the 4 components"):
        lora.pace_components(torch.optim.SGD(model.parameters(), lr=0.1), model, paces)


def test_an_optimizer_of_something_else():
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="SGD holds no lora_B"):
        lora.pace_components(torch.optim.SGD(other.parameters(), lr=0.1), OnGrid(), PACES)


def test_paces_are_replaced_and_taken_back():
    model, plain = OnGrid(), OnGrid()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for paces in ([3.0] * 4, PACES, None):
        lora.pace_components(optimizer, model, paces)
        assert paces_of(optimizer) == (paces and tuple(paces))
    one_step(model, optimizer, 0)
    one_step(plain, torch.optim.SGD(plain.parameters(), lr=1e-3), 0)
    assert torch.equal(model.from_zero("linear"), plain.from_zero("linear"))


def test_a_layer_of_a_lower_rank_and_ranks_spread_over_layers():
    """A component learns at the pace of the lowest rank of the model that uses it."""
    model = nn.Sequential(lora.Linear(6, 6, r=4), lora.Linear(6, 6, r=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model[0].components_at, model[1].components_at = (1, 2, 3, 4), (0, 1, 1, 2)
    lora.pace_components(optimizer, model, PACES)
    moved = []
    for paced in (True, False):
        if not paced:
            lora.pace_components(optimizer, model, None)
        before = [layer.lora_B.detach().clone() for layer in model]
        model.zero_grad()
        for layer in model:
            layer.lora_B.grad = torch.ones_like(layer.lora_B)
        optimizer.step()
        moved.append([layer.lora_B.detach() - old for layer, old in zip(model, before, strict=True)])
    for layer, paces in enumerate([PACES, [PACES[1], PACES[3]]]):
        torch.testing.assert_close(moved[0][layer], moved[1][layer] * torch.tensor(paces))


@pytest.mark.parametrize("name", ["in 8 bits", "in bf16"])
def test_other_precisions(name):
    model, plain = (nn.Sequential(lora.Linear(64, 64, r=4)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    kind = torch.bfloat16 if name == "in bf16" else torch.float32
    make = {
        "in 8 bits": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=1),
        "in bf16": lambda p: torch.optim.AdamW(p, lr=1e-2),
    }
    moved = []
    for each, paces in ((model, PACES), (plain, None)):
        each.to(kind)
        optimizer = make[name](each.parameters())
        lora.pace_components(optimizer, each, paces)
        torch.manual_seed(0)
        each(torch.randn(3, 64, dtype=kind)).square().sum().backward()
        optimizer.step()
        moved.append(each[0].lora_B.detach().float())
    torch.testing.assert_close(moved[0], moved[1] * torch.tensor(PACES), rtol=1e-2, atol=0)


@given(st.integers(1, 70), st.data())
def test_usual_paces(r_max, data):
    """They fall to 1; component k has that of a LoRA of rank k with alpha 16 beside one of r_max with 2 r_max."""
    r_min = data.draw(st.integers(1, r_max))
    paces = usual_paces(r_max, r_min)
    assert len(paces) == r_max and paces[-1] == 1 and paces == tuple(sorted(paces, reverse=True))
    if r_max >= 8:
        assert paces[0] == max(1, (16 / r_min) / 2) and paces[:r_min] == (paces[0],) * r_min


class WithMore(torch.optim.SGD):
    """A subclass that calls its parent's step, and moves parameters itself."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= 1e-2
        return loss


@pytest.mark.parametrize("made_before", [False, True])  # torch looks after a class's step from its first instance on
def test_a_step_of_a_subclass_counts_whole(made_before):
    if made_before:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    moved = []
    for paces in (PACES, None):
        model = OnGrid()
        start = model.from_zero("linear").detach().clone()
        optimizer = WithMore(model.parameters(), lr=1e-3)
        lora.pace_components(optimizer, model, paces)
        one_step(model, optimizer, 0)
        moved.append(model.from_zero("linear").detach() - start)
    torch.testing.assert_close(moved[0], moved[1] * torch.tensor(PACES))


def test_a_factor_that_layers_share_is_paced_once():
    first, second = lora.Linear(6, 6, r=4), lora.Linear(6, 6, r=4)
    second.lora_B = first.lora_B
    model = nn.Sequential(first, second)
    optimizer = torch.optim.SGD([first.lora_B], lr=1e-3)
    lora.pace_components(optimizer, model, PACES)
    first.lora_B.grad = torch.ones_like(first.lora_B)
    optimizer.step()
    torch.testing.assert_close(first.lora_B.detach(), -1e-3 * torch.tensor(PACES).expand(6, 4))


def test_what_is_refused_leaves_the_former_paces():
    model = OnGrid()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lora.pace_components(optimizer, model, PACES)
    with pytest.raises(ValueError, match="give a number above 0"):
        lora.pace_components(optimizer, model, [1.0])
    assert paces_of(optimizer) == tuple(PACES)


@pytest.mark.parametrize("name", ["LBFGS", "AdamWScheduleFree"])
def test_optimizers_that_would_not_notice_are_refused_at_once(name):
    model = OnGrid()
    make = {"LBFGS": torch.optim.LBFGS, "AdamWScheduleFree": schedulefree.AdamWScheduleFree}[name]
    with pytest.raises(ValueError, match=f"{name} keeps a second set of values or learns from differences"):
        lora.pace_components(make(model.parameters()), model, PACES)


def test_averaged_values_are_refused_at_the_step_even_if_the_first_layer_has_none():
    """torch's ASGD keeps an average beside; a layer without a gradient has none yet."""
    model = nn.Sequential(lora.Linear(6, 6, r=4), lora.Linear(6, 6, r=4))
    optimizer = torch.optim.ASGD([model[0].lora_B, model[1].lora_B])
    lora.pace_components(optimizer, model, PACES)
    model[1].lora_B.grad = torch.ones_like(model[1].lora_B)
    with pytest.raises(ValueError, match="ASGD keeps a second set of values"):
        optimizer.step()


def test_an_optimizer_of_the_other_factor_alone():
    model = OnGrid()
    with pytest.raises(ValueError, match=r"SGD holds no lora_B \(of an Embedding: lora_A\) of the model"):
        lora.pace_components(torch.optim.SGD([model.layers["linear"].lora_A], lr=0.1), model, PACES)


@pytest.mark.parametrize("schedule", [lora.RankSchedule("fixed"), lora.RankSchedule(), lora.RankSchedule(paced=True)])
def test_a_users_paces_stay_under_a_schedule_that_has_none(schedule):
    model = nn.Sequential(lora.Linear(6, 6, r=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lora.pace_components(optimizer, model, PACES)
    seen = []
    for x in schedule.resolve(4, "alpha/b", 3).over([torch.randn(2, 6)] * 3, model, optimizer):
        model(x).sum().backward()
        seen.append(paces_of(optimizer))
    own = [tuple(PACES)] * 3
    assert (seen == own) == (not schedule.paced) and (paces_of(optimizer) == tuple(PACES)) == (not schedule.paced)
