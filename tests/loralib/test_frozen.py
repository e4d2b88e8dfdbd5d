"""Frozen means frozen, under optimizers with momentum, history and weight decay."""

import bitsandbytes as bnb
import pytest
import schedulefree
import torch
from torch import nn

import loralib as lora
from loralib.momenta import VALUE, kept_for

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "Adam with L2": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "in 8 bits": lambda p: bnb.optim.AdamW8bit(p, lr=0.1, weight_decay=0.1, min_8bit_size=1),
    "schedule-free": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1, weight_decay=0.1),
}


def setup(optimizer):
    model = nn.Sequential(
        lora.Linear(6, 6, r=4), lora.MergedLinear(6, 9, r=4, enable_lora=[True, False, True]), nn.Unflatten(1, (1, 3, 3)),
        lora.Conv2d(1, 2, 3, r=4),
    )  # fmt: skip
    for layer in (model[0], model[1], model[3]):
        nn.init.normal_(layer.lora_B)
    lora.mark_only_lora_as_trainable(model)
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    lora.freeze_undrawn(optimizer, model)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return model, optimizer


def components(model):
    """Every component's numbers, as one row each: (layer, component)."""
    layers = (model[0], model[1], model[3])
    return [
        [
            torch.cat([m.split_A(m.lora_A)[:, j].flatten(), m.split_B(m.lora_B)[:, j].flatten()]).detach().clone()
            for j in range(4)
        ]
        for m in layers
    ]


def step(model, optimizer, *micro_batches, frozen=True):
    optimizer.zero_grad()
    for ranks in micro_batches:
        lora.set_rank(model, ranks, frozen)
        model(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()


def moved(model, before):
    return [
        [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]
        for a, b in zip(before, components(model), strict=True)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_drawn_components_move(name):
    model, optimizer = setup(name)
    step(model, optimizer, torch.tensor([1, 2, 3]), 4)  # all have a history now
    for ranks, drawn in [((2,), {2}), ((torch.tensor([1, 4, 4]),), {1, 4}), ((3, torch.tensor([1, 3, 0])), {1, 3})]:
        before = components(model)
        step(model, optimizer, *ranks)
        assert moved(model, before) == [[b in drawn for b in (1, 2, 3, 4)]] * 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_too_and_the_momenta_wait(name):
    model, optimizer = setup(name)
    before = components(model)
    step(model, optimizer, 2)
    assert moved(model, before) == [[False, True, False, False]] * 3
    for parameter, split in ((model[0].lora_A, model[0].split_A), (model[0].lora_B, model[0].split_B)):
        for kept in kept_for(optimizer, parameter):
            if not kept.is_shared:
                wanted = split(parameter if kept.follows == VALUE else torch.zeros_like(parameter))
                # In 8 bits the least square is a millionth of the largest.
                torch.testing.assert_close(split(kept.read())[:, [0, 2, 3]], wanted[:, [0, 2, 3]], rtol=0, atol=1e-6)


def test_without_frozen_the_components_up_to_the_highest_rank_move():
    model, optimizer = setup("AdamW")
    step(model, optimizer, 4, frozen=False)
    before = components(model)
    step(model, optimizer, torch.tensor([1, 2, 1]), frozen=False)
    assert moved(model, before) == [[True, True, False, False]] * 3


def test_evaluation_between_steps_draws_nothing():
    model, optimizer = setup("AdamW")
    step(model, optimizer, 4, frozen=False)
    before = components(model)
    optimizer.zero_grad()
    lora.set_rank(model, 1, frozen=True)
    model(torch.randn(3, 6)).square().mean().backward()
    with torch.no_grad(), lora.use_rank(model, 3):
        model(torch.randn(3, 6))
    model.eval()
    with lora.use_rank(model, 2):
        model(torch.randn(3, 6))
    optimizer.step()
    assert moved(model, before) == [[True, False, False, False]] * 3


def test_a_zero_gradient_alone_is_not_enough():
    """What the hook is for: without it AdamW moves components that were not drawn."""
    model, _ = setup("AdamW")
    plain = OPTIMIZERS["AdamW"]([p for p in model.parameters() if p.requires_grad])
    step(model, plain, 4)
    before = components(model)
    step(model, plain, 1)
    assert moved(model, before)[0] == [True] * 4


def test_a_step_that_the_scaler_skips_does_not_count():
    """What was drawn for it is as little drawn in the next step as if it had not been."""
    model, optimizer = setup("AdamW")
    step(model, optimizer, 4, frozen=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for scale, rank in ((float("inf"), 2), (1.0, 3)):
        before = components(model)
        optimizer.zero_grad()
        lora.set_rank(model, rank, frozen=True)
        scaler.scale(model(torch.randn(3, 6)).square().mean() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert moved(model, before) == [[b == 3 == rank for b in (1, 2, 3, 4)]] * 3


def test_an_optimizer_that_accelerate_has_wrapped():
    from accelerate import Accelerator

    model = lora.inject(nn.Sequential(nn.Linear(6, 6)), ["0"], r=4)
    lora.mark_only_lora_as_trainable(model)
    adamw = torch.optim.AdamW([model[0].lora_A, model[0].lora_B], lr=0.1, weight_decay=0.1)
    optimizer = Accelerator(cpu=True).prepare_optimizer(adamw)
    lora.freeze_undrawn(optimizer, model)
    lora.set_rank(model, 2)
    before = model[0].lora_A.detach().clone()
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].lora_A[2:], before[2:])


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_with_a_closure_freezes_what_the_closure_did_not_draw(by_name):
    """As Lightning steps: the gradient is there only once the closure has run."""
    model, optimizer = setup("AdamW")
    for step, b in enumerate((3, 1, 4, 2)):
        lora.set_rank(model, b, frozen=True)
        before = components(model)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.randn(5, 6)).square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert loss > 0
        for old, new in zip(before, components(model), strict=True):
            assert [j for j in range(4) if not torch.equal(old[j], new[j])] == [b - 1], step


@pytest.mark.parametrize("closure", [False, True])
def test_a_subclass_that_moves_parameters_itself_is_held_too(closure):
    """torch calls the hooks of a subclass whose step calls its parent's for both."""

    class WithMore(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= 1e-2

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch looks after a class's step from its first instance on
    model = nn.Sequential(lora.Linear(6, 6, r=4))
    nn.init.normal_(model[0].lora_B)
    optimizer = WithMore([model[0].lora_A, model[0].lora_B], lr=0.1, weight_decay=0.1)
    lora.freeze_undrawn(optimizer, model)
    lora.set_rank(model, 2, frozen=True)
    before = model[0].lora_A.detach().clone(), model[0].lora_B.detach().clone()

    def backward():
        model(torch.randn(3, 6)).square().mean().backward()

    if not closure:
        backward()
    optimizer.step(backward if closure else None)
    others = [0, 2, 3]
    assert torch.equal(model[0].lora_A[others], before[0][others]) and not torch.equal(model[0].lora_A[1], before[0][1])
    assert torch.equal(model[0].lora_B[:, others], before[1][:, others])
