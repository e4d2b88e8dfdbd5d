"""Gradient checkpointing: exact, or refused in one sentence."""

import copy
import gc
import pickle

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


def model_with(layers=("0", "2"), **options):
    torch.manual_seed(0)
    model = lora.inject(Net(**options), list(layers), r=3)
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [["2"], ["0"], ["0", "2"]])
def test_wherever_the_layer_stands_and_in_evaluation_mode_too(layers, training):
    """A recomputation ends within its last layer; it does not look at the mode."""
    with pytest.raises(RuntimeError, match=r"layer 'block\..' is computed again"):
        contrastive(model_with(layers, use_reentrant=False).train(training))
    plain, exact = model_with(layers), model_with(layers, use_reentrant=False)
    exact.options["context_fn"] = lora.checkpoint_contexts(exact)
    for model in (plain, exact):
        contrastive(model.train(training))
    assert all(torch.equal(a, b) for a, b in zip(gradients(exact), gradients(plain), strict=True))


@pytest.mark.parametrize("layers", [["2"], ["0", "2"]])
@pytest.mark.parametrize("early", [True, False])
def test_a_second_backward_pass_of_a_graph_that_is_kept(layers, early):
    plain, model = model_with(layers), model_with(layers, use_reentrant=False, early_stop=early)
    for each in (plain, model):
        lora.set_rank(each, FIRST)
        loss = each(X).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))
    lora.set_rank(model, FIRST)
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    lora.set_rank(model, SECOND)
    with pytest.raises(RuntimeError, match="is computed again"):
        loss.backward()


def test_a_copy_of_a_model_with_contexts_is_exact_too_and_layers_that_they_do_not_know_are_looked_at():
    plain, model = model_with(), model_with(use_reentrant=False)
    model.options["context_fn"] = lora.checkpoint_contexts(model)
    for each in (plain, copied := pickle.loads(pickle.dumps(copy.deepcopy(model)))):
        contrastive(each)
    assert all(torch.equal(a, b) for a, b in zip(gradients(copied), gradients(plain), strict=True))
    late = model_with(["0"], use_reentrant=False)
    late.options["context_fn"] = lora.checkpoint_contexts(late)
    lora.inject(late, ["2"], r=3)
    with pytest.raises(RuntimeError, match=r"layer 'block.2' is computed again"):
        contrastive(late)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_needs_no_gradient_goes_on(frozen, rank):
    """A layer at rank 0, or all of whose factors are frozen, leaves no trace in the graph where its input has none."""
    plain, model = model_with(), model_with(use_reentrant=False)
    for each in (plain, model):
        lora.set_rank(each, rank)
        each.block[0].requires_grad_(not frozen)
        each.block[0].weight.requires_grad_(False)
        each.block[2].bias.requires_grad_()
        each(X).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))


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
