"""Gradient checkpointing: exact, or refused in one sentence."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import loralib as lora

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
FIRST, SECOND = torch.tensor([1, 2, 3, 3]), torch.tensor([3, 1, 1, 2])


class Net(nn.Module):
    """Two adapted layers in one checkpointed block."""

    def __init__(self, **options):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.options = options

    def forward(self, x):
        return checkpoint(self.block, x, **self.options) if self.options else self.block(x)


def model_with(**options):
    torch.manual_seed(0)
    model = lora.inject(Net(**options), ["0", "2"], r=3)
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.train()


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def contrastive(model):
    """Two forward passes at different ranks, then one backward pass."""
    lora.set_rank(model, FIRST)
    one = model(X)
    lora.set_rank(model, SECOND)
    (one * model(X)).sum().backward()


def left_before_backward(model):
    """``use_rank`` is over when the backward pass comes."""
    with lora.use_rank(model, 1):
        loss = model(X).square().sum()
    loss.backward()


@pytest.mark.parametrize("loss", [contrastive, left_before_backward])
def test_ranks_that_change_before_the_backward_pass(loss):
    plain = model_with()
    loss(plain)
    with pytest.raises(
        RuntimeError, match=r"layer 'block\..' is computed again .* context_fn=loralib.checkpoint_contexts"
    ):
        loss(model_with(use_reentrant=False))
    exact = model_with(use_reentrant=False)
    exact.options["context_fn"] = lora.checkpoint_contexts(exact)
    loss(exact)
    assert all(torch.equal(a, b) for a, b in zip(gradients(exact), gradients(plain), strict=True))
    if loss is contrastive:
        assert torch.equal(lora.get_rank(exact), SECOND)
    else:
        assert lora.get_rank(exact) == 3


def test_a_reentrant_recomputation_is_refused():
    x = X.clone().requires_grad_()
    model = model_with(use_reentrant=True)
    lora.set_rank(model, FIRST)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(x).sum().backward()


def test_what_is_right_goes_on_as_it_was():
    """One state until the backward pass; several passes in one state; graphs that were dropped or are over; no_grad passes."""
    plain, model = model_with(), model_with(use_reentrant=False)
    old_losses = []
    for each in (plain, model):
        for ranks in (FIRST, SECOND, 2):
            lora.set_rank(each, ranks)
            loss = each(X).square().sum() + each(2 * X).sum()
            with torch.no_grad(), lora.use_rank(each, 3):
                each(X)
            loss.backward()
            old_losses.append(loss)  # kept, as one does for a log: its backward pass is over
        lora.set_rank(each, 1)
        dropped = each(X)  # its graph is dropped unused
        del dropped
        gc.collect()
        lora.set_rank(each, FIRST)
        each(X).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))


def test_without_checkpointing_nothing_is_refused():
    model = model_with()
    contrastive(model)
    left_before_backward(model)
