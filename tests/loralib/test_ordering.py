"""order_components against the definition (Eckart-Young), autograd and PEFT's reduction by SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.ordering import ordered

from .helpers import KINDS, dense_delta, dense_forward, make


def matrices(kind, layer, delta):
    """The weight's change as the matrices that are ordered, (projections, out, in)."""
    if kind == "fan_in_fan_out":
        delta = delta.T
    if kind == "merged":
        first, _, last = delta.chunk(3)
        return torch.stack([first, last])
    if kind.startswith("conv"):
        delta = delta.view(layer.lora_B.shape[0], layer.lora_A.shape[1])
    return delta[None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 3])
def test_every_rank_is_the_nearest_matrix_of_its_rank_and_r_max_is_unchanged(kind, r):
    torch.manual_seed(r)
    layer, x = make(kind, r, scaling="alpha/r")
    model = nn.Sequential(layer)
    before, output = dense_delta(kind, layer, r), layer(x)
    singular = torch.linalg.svdvals(matrices(kind, layer, before))
    lora.order_components(model)
    torch.testing.assert_close(layer(x), output)
    for b in range(r + 1):
        lora.set_rank(model, b)
        torch.testing.assert_close(layer(x), dense_forward(kind, layer, x, b))
        error = matrices(kind, layer, before - dense_delta(kind, layer, b)).square().sum((-2, -1))
        torch.testing.assert_close(error, singular[:, b * layer.rows :].square().sum(-1), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_any_shape_keeps_its_product_and_its_mean_length(n, out, into, seed):
    """Also where there are more components than the product can have."""
    torch.manual_seed(seed)
    kept, other = torch.randn(2, n, into).double(), torch.randn(2, out, n).double()
    new_kept, new_other, R = ordered(kept, other)
    torch.testing.assert_close(new_other @ new_kept, other @ kept)
    torch.testing.assert_close(R @ kept, new_kept)
    if n <= min(out, into):
        length = kept.square().sum((-2, -1)) / n
        torch.testing.assert_close(
            new_kept @ new_kept.mT, length[:, None, None] * torch.eye(n).double().expand(2, n, n)
        )


def test_an_adapter_that_has_not_trained_stays_what_it_is_and_can_train():
    for layer in (lora.Linear(5, 4, r=3), lora.Embedding(5, 4, r=3)):
        lora.order_components(nn.Sequential(layer))
        (zero, other) = sorted((layer.lora_A, layer.lora_B), key=lambda p: float(p.detach().norm()))
        assert not zero.any() and (torch.linalg.matrix_rank(other) == 3)


def step_at_rest(optimizer, layer, x):
    """One step with learning rate 0: the state is filled, nothing moves. Returns the gradients."""
    optimizer.zero_grad()
    torch.manual_seed(0)
    output = layer(x)
    (output * torch.randn_like(output)).sum().backward()
    gradients = {p: p.grad.clone() for p in (layer.lora_A, layer.lora_B)}
    optimizer.step()
    return gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_momenta_are_those_of_the_ordered_components(kind, optimizer):
    torch.manual_seed(1)
    layer, x = make(kind, 2)
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    own = optimizer([layer.lora_A, layer.lora_B], lr=0.0, **more)
    name, share = ("momentum_buffer", 1.0) if more else ("exp_avg", 0.1)
    first = step_at_rest(own, layer, x)
    for p, gradient in first.items():
        torch.testing.assert_close(own.state[p][name], share * gradient)
    lora.order_components(nn.Sequential(layer), own)
    carried = {p: own.state[p][name].clone() for p in first}
    for p, gradient in step_at_rest(own, layer, x).items():
        torch.testing.assert_close(carried[p], share * gradient)


def test_squares_are_exact_where_ordering_only_sorts():
    torch.manual_seed(0)
    layer = lora.Linear(4, 4, r=3).double()
    with torch.no_grad():  # orthogonal components, the largest last
        layer.lora_A.copy_(2 * torch.eye(3, 4))
        layer.lora_B.copy_(torch.eye(4, 3) * torch.tensor([1.0, 2.0, 5.0]))
    own = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.0)
    x = torch.randn(6, 4).double()
    step_at_rest(own, layer, x)
    lora.order_components(nn.Sequential(layer), own)
    torch.testing.assert_close(layer.lora_B.detach().norm(dim=0), torch.tensor([5.0, 2.0, 1.0]).double())
    carried = {p: own.state[p]["exp_avg_sq"].clone() for p in (layer.lora_A, layer.lora_B)}
    for p, gradient in step_at_rest(own, layer, x).items():
        torch.testing.assert_close(carried[p], 0.001 * gradient.square())


def test_lower_ranks_are_pefts_reduction_by_svd(tmp_path):
    from peft import PeftModel, convert_to_lora
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    torch.manual_seed(0)
    base = BertModel(config)
    base.save_pretrained(tmp_path / "base")
    model = lora.inject(base, ["query", "value"], r=4, lora_alpha=8, scaling="alpha/r")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    lora.save_adapter(model, tmp_path / "adapter")
    peer = PeftModel.from_pretrained(BertModel.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    lora.order_components(model)
    for b in (1, 2, 4):
        reduced, state = convert_to_lora(peer, rank=b)
        lora.set_rank(model, b)
        for name, layer in model.named_modules():
            if isinstance(layer, lora.LoRALayer):
                A, B = (state[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
                torch.testing.assert_close(
                    layer.delta_weight(), reduced.lora_alpha / reduced.r * B @ A, rtol=1e-3, atol=1e-3
                )


def test_a_merged_model_is_refused_untouched():
    model = nn.Sequential(lora.Linear(4, 4, r=2), lora.Linear(4, 4, r=2))
    nn.init.normal_(model[0].lora_B)
    before = model[0].lora_B.detach().clone()
    model[1].merge()
    with pytest.raises(RuntimeError, match="layer '1' is merged"):
        lora.order_components(model)
    assert torch.equal(model[0].lora_B, before)


def test_gradients_that_wait_for_their_step_are_turned_along():
    layer, x = make("linear", 3, scaling="alpha/r")
    model = nn.Sequential(layer)
    model(x).square().sum().backward()
    lora.order_components(model)
    waited = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(waited, (layer.lora_A.grad, layer.lora_B.grad))


def test_ordering_again_takes_back_ranks_that_importance_spread():
    torch.manual_seed(0)
    model = lora.inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), ["0", "1"], r=4)
    for layer in model:
        nn.init.normal_(layer.lora_B)
        layer.components_at = (1, 3, 4, 4)
    lora.set_rank(model, 2)
    lora.order_components(model)
    assert lora.get_rank(model) == 2 and [layer.state.rank for layer in model] == [2, 2]
