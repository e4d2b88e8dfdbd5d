"""Every layer against the dense formula, in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loralib as lora

from .helpers import KINDS, dense_delta, dense_forward, make

every_layer = pytest.mark.parametrize("kind", KINDS)
cases = st.tuples(
    st.sampled_from(KINDS),
    st.integers(1, 6),
    st.floats(0.5, 32),
    st.sampled_from(["alpha/b", "alpha/r", "alpha/sqrt(b)"]),
    st.randoms(use_true_random=False),
)


def gradients(output, layer):
    """The gradients of a fixed random functional of the output with respect to both factors."""
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weight).sum(), [layer.lora_A, layer.lora_B], allow_unused=True)


def same(x, y):
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(x, y, strict=True))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_int_rank_is_the_formula_with_gradients(case):
    kind, r, alpha, scaling, random = case
    layer, x = make(kind, r, alpha, scaling)
    b = random.randint(1, r)
    layer.set_rank(b)
    found, wanted = layer(x), dense_forward(kind, layer, x, b)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert same(gradients(found, layer), gradients(wanted, layer))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_a_rank_per_example_is_each_example_alone_with_gradients(case):
    kind, r, alpha, scaling, random = case
    layer, x = make(kind, r, alpha, scaling)
    ranks = torch.tensor([random.randint(0, r) for _ in x])
    layer.set_rank(ranks)
    found = layer(x)
    wanted = torch.cat([dense_forward(kind, layer, x[i : i + 1], int(b)) for i, b in enumerate(ranks)])
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    if ranks.any():
        assert same(gradients(found, layer), gradients(wanted, layer))


@every_layer
def test_rank_zero_is_the_base_layer_to_the_bit(kind):
    layer, x = make(kind, 3)
    layer.set_rank(0)
    assert torch.equal(layer(x), layer.base(x))


@every_layer
def test_a_new_layer_computes_what_its_base_does(kind):
    layer, x = make(kind, 3)
    layer.reset_adapter()
    assert torch.equal(layer(x), layer.base(x))
    assert layer.get_rank() == layer.get_dimension() == 3
    assert (layer.lora_A.abs().sum() > 0) != (layer.lora_B.abs().sum() > 0)


@every_layer
@pytest.mark.parametrize("shape", [(4,), (5, 4)])
def test_any_gate_weighs_the_components(kind, shape):
    layer, x = make(kind, 4, alpha=1.0, scaling="alpha/r")
    gate = torch.randn(shape, dtype=torch.float64)
    layer.set_gate(gate)
    components = [dense_delta(kind, layer, j + 1) - dense_delta(kind, layer, j) for j in range(4)]
    weights = layer.weight.detach()
    wanted = []
    for i in range(5):
        row = gate if gate.ndim == 1 else gate[i]
        total = sum(4 * g * c for g, c in zip(row, components, strict=True))
        layer.weight.data = weights + total
        wanted.append(layer.base(x[i : i + 1]).detach())
    layer.weight.data = weights
    assert torch.allclose(layer(x), torch.cat(wanted), atol=1e-9)
    assert layer.get_rank() is None


@every_layer
@pytest.mark.parametrize("per_example", [False, True])
def test_frozen_has_the_same_output_and_only_component_b_gets_a_gradient(kind, per_example):
    layer, x = make(kind, 4)
    x = x.requires_grad_() if x.is_floating_point() else x
    ranks = torch.tensor([1, 3, 3, 0, 1]) if per_example else 3
    layer.set_rank(ranks)
    free = layer(x)
    layer.set_rank(ranks, frozen=True)
    frozen = layer(x)
    assert torch.allclose(free, frozen, rtol=1e-12)
    if x.is_floating_point():  # the gradient to the input flows through all components
        to_x = [torch.autograd.grad(h.square().sum(), x, retain_graph=True)[0] for h in (free, frozen)]
        assert torch.allclose(*to_x)
    grad_A, grad_B = gradients(frozen, layer)
    moved = layer.split_A(grad_A).abs().sum((0, 2, 3)) > 0
    assert moved.tolist() == [per_example, False, True, False]
    assert (layer.split_B(grad_B).abs().sum((0, 2)) > 0).tolist() == moved.tolist()
    # Component 3 gets, from the examples at rank 3, what it gets when nothing is frozen and those examples are alone.
    keep = (ranks == 3) if per_example else torch.ones(5, dtype=torch.bool)
    layer.set_rank(3)
    alone = torch.where(keep.view(-1, *[1] * (free.ndim - 1)), layer(x), torch.zeros_like(free))
    assert torch.allclose(layer.split_A(gradients(alone, layer)[0])[:, 2], layer.split_A(grad_A)[:, 2])


@every_layer
@settings(max_examples=15, deadline=None)
@given(
    actions=st.lists(st.sampled_from(["merge", "unmerge", "train", "eval", "forward"]), max_size=8), b=st.integers(0, 3)
)
def test_merging_is_exact_and_undone_to_the_bit(kind, actions, b):
    layer, x = make(kind, 3)
    before = layer.weight.detach().clone()
    layer.set_rank(b)
    wanted = layer(x)
    for action in actions:
        found = layer(x) if action == "forward" else getattr(layer, action)()
        if action == "forward":
            assert torch.allclose(found, wanted, atol=1e-10)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


@every_layer
def test_a_merged_layer_keeps_its_rank(kind):
    layer, _ = make(kind, 3)
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.set_rank(2)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.set_gate(torch.ones(3))


@every_layer
def test_a_merged_layers_state_dict_holds_w0_and_what_it_loads_is_merged(kind):
    """However it was merged meanwhile, a layer that loads it computes the same at every rank."""
    layer, x = make(kind, 3)
    plain = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.set_rank(2)
    layer.merge()
    stored = layer.state_dict()
    assert stored.keys() == plain.keys() and all(torch.equal(stored[name], plain[name]) for name in plain)
    other, _ = make(kind, 3)
    other.set_rank(1)
    other.merge()
    other.load_state_dict(stored)
    assert other.is_merged
    merged = other(x)
    other.unmerge()
    for b in range(4):
        other.set_rank(b)
        torch.testing.assert_close(other(x), dense_forward(kind, other, x, b))
        if b == 1:
            torch.testing.assert_close(merged, other(x))
    assert torch.equal(other.weight, plain["weight"])


def test_per_example_ranks_cannot_be_merged():
    layer, _ = make("linear", 3)
    layer.set_rank(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="one rank"):
        layer.merge()


def test_merging_leaves_a_tied_weight_alone():
    layer, _ = make("embedding", 3)
    output = torch.nn.Linear(7, 11, bias=False)
    output.weight = layer.weight
    before = output.weight.clone()
    layer.merge()
    assert torch.equal(output.weight, before)
    layer.unmerge()
    assert output.weight is layer.weight


@pytest.mark.parametrize("rank", [True, 1.0, "2", None, torch.tensor([1.0]), torch.tensor([True])])
def test_what_is_no_rank_is_a_type_error(rank):
    layer, _ = make("linear", 3)
    with pytest.raises(TypeError, match="rank is"):
        layer.set_rank(rank)


@pytest.mark.parametrize(
    "rank", [-1, 4, torch.tensor([0, 4]), torch.tensor([-1, 2]), torch.tensor(2), torch.tensor([[1]])]
)
def test_a_rank_out_of_range_is_a_value_error_and_changes_nothing(rank):
    layer, _ = make("linear", 3)
    with pytest.raises(ValueError, match="rank"):
        layer.set_rank(rank)
    assert layer.get_rank() == 3


def test_ranks_for_another_batch_size_are_refused_by_name():
    model = torch.nn.Sequential(lora.Linear(6, 6, r=2))
    lora.set_rank(model, torch.tensor([1, 2, 2]))
    with pytest.raises(ValueError, match=r"3 ranks are set, and Sequential got inputs of shape \(5, 6\)"):
        model(torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"layer .0. got an input of shape .* outside a call of the model"):
        lora.declare_layout(model, 0)
        model[0](torch.randn(5, 6))


def test_an_input_of_one_row_serves_all_ranks():
    """Position ids have a leading dimension of 1."""
    layer, _ = make("embedding", 3)
    layer.set_rank(torch.tensor([0, 2, 3]))
    positions = torch.arange(4)[None]
    found = layer(positions)
    for i, b in enumerate((0, 2, 3)):
        assert torch.allclose(found[i], dense_forward("embedding", layer, positions, b)[0])


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 0}, {"lora_alpha": -1}, {"scaling": "alpha"}, {"r": -1}, {"r": 2.0}]
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError):
        lora.Linear(4, 4, **{"r": 2, **options})


def test_without_rank_the_layers_are_plain():
    assert [n for n, _ in lora.Linear(3, 3).named_parameters()] == ["weight", "bias"]
    assert [n for n, _ in lora.MergedLinear(3, 3, r=2).named_parameters()] == ["weight", "bias"]
    assert lora.Linear(3, 3).weight.requires_grad and not lora.Linear(3, 3, r=1).weight.requires_grad


def test_dropout_acts_on_the_adapter_alone():
    layer = lora.Linear(50, 50, r=4, lora_dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 50)
    assert not torch.equal(layer(x), layer(x))
    layer.set_rank(0)
    assert torch.equal(layer(x), layer.base(x))
    layer.set_rank(4)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@every_layer
def test_bfloat16_autocast_and_mixed_ranks(kind):
    layer, x = make(kind, 3, dtype=torch.float32)
    layer.set_rank(torch.tensor([0, 1, 2, 3, 3]))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    exact = layer(x)
    assert (low.float() - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("name", ["set_rank", "set_matryoshka_gate", "set_gate"])
def test_what_was_set_in_inference_mode_can_be_trained(name):
    model = lora.inject(torch.nn.Sequential(torch.nn.Linear(6, 3)), ["0"], r=4)
    with torch.inference_mode():
        values = {"set_rank": torch.tensor([1, 2]), "set_matryoshka_gate": [1, 2], "set_gate": torch.rand(2, 4)}
        getattr(lora, name)(model, values[name])
        model(torch.randn(2, 6))
    model(torch.randn(2, 6)).sum().backward()
    assert model[0].lora_B.grad.abs().sum() > 0
