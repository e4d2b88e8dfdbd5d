"""Strengths of each rank's own: against the formula, against least squares, and in files against stock PEFT."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loralib as lora
from loralib.adapters.directory import cut_adapter, read_directory
from loralib.gate import scale
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig
from loralib.strengths import interpolation

TABLE = (0.5, 2.0, 0.75, 1.0)


def small_model(scaling="alpha/r", r=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    lora.inject(model, ["0", "2"], r=r, lora_alpha=6, scaling=scaling)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def with_tables(scaling="alpha/r"):
    model = small_model(scaling)
    for k, (_, layer) in enumerate(lora_layers(model)):
        layer.strength_at = TABLE if k else (1.5, 0.25, 3.0, 1.0)
    return model


def by_hand(model, x, b):
    """The formula, with the weights alone."""
    for module in model:
        if not isinstance(module, lora.LoRALayer):
            x = module(x)
            continue
        own = scale(b, module.r, module.lora_alpha, module.scaling) * module.strength_at[b - 1]
        weight = module.weight + own * module.lora_B[:, :b] @ module.lora_A[:b]
        x = nn.functional.linear(x, weight, module.bias)
    return x


def batches(n=4, size=16):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(size, 6, generator=generator), "y": torch.randint(4, (size,), generator=generator)}
        for _ in range(n)
    ]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("scaling", ["alpha/b", "alpha/r", "alpha/sqrt(b)"])
def test_every_way_to_run_a_rank_is_at_its_strength(scaling):
    model, x = with_tables(scaling), torch.randn(5, 6)
    wanted = torch.stack([by_hand(model, x, b) for b in (1, 2, 3, 4)])
    for b in (1, 2, 3, 4):
        lora.set_rank(model, b)
        torch.testing.assert_close(model(x), wanted[b - 1])
        merged = lora.merge(copy.deepcopy(model), b)
        torch.testing.assert_close(merged(x), wanted[b - 1])
    ranks = torch.tensor([3, 1, 4, 2, 2])
    lora.set_rank(model, ranks)
    torch.testing.assert_close(model(x), wanted[ranks - 1, torch.arange(5)])
    for b, output in lora.at_ranks(model, {"input": x}, [4, 2, 1]):
        torch.testing.assert_close(output, wanted[b - 1])


def test_gates_of_several_ranks_are_sums_of_theirs():
    (_, layer), *_ = lora_layers(with_tables())
    x, each = torch.randn(2, 6), []
    for b in (1, 2, 3, 4):
        layer.set_rank(b)
        each.append(layer(x) - layer.base(x))
    layer.set_rank(torch.tensor([[0.5, 0.25, 0, 0.25]] * 2))
    torch.testing.assert_close(layer(x) - layer.base(x), 0.5 * each[0] + 0.25 * each[1] + 0.25 * each[3])
    lora.set_matryoshka_gate(layer, [1, 3])
    torch.testing.assert_close(layer(x) - layer.base(x), each[0] + each[2])


def test_it_finds_the_least_squares_solution():
    """Of one linear layer each rank's strength has a closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    lora.inject(model, ["0"], r=4)
    (_, layer), *_ = lora_layers(model)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(512, 6)
    lora.set_rank(model, 0)
    with torch.no_grad():
        # Nearer to the update of rank 4 at 0.8 of its strength than at the whole.
        change = 0.8 * layer.strength() * x @ layer.lora_A.T @ layer.lora_B.T + 0.1 * torch.randn(512, 5)
        target = layer.base(x) + change

    def updates():
        for b, _ in lowered(model):
            yield b, model(x) - layer.base(x)

    old = dict(updates())
    lora.fit_strengths(
        model, [{"x": x, "y": target}], lambda m, e: nn.functional.mse_loss(m(e["x"]), e["y"]), updates=400
    )
    assert layer.strength_at[3] == 1
    for b, new in updates():
        share = float((new * old[b]).sum() / old[b].square().sum())
        wanted = float((old[b] * change).sum() / old[b].square().sum())
        if b in (1, 2, 4):  # the ranks share the batch, a third of the examples each
            assert share == pytest.approx(wanted, rel=0.05)
        torch.testing.assert_close(new, share * old[b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", ["alpha/b", "alpha/r"])
def test_losses_fall_and_only_strengths_change(scaling):
    model, data = small_model(scaling).train(), batches()
    before = copy.deepcopy(model)
    old = {b: sum(float(loss(m, batch)) for batch in data) for b, m in lowered(before)}
    lora.fit_strengths(model, data, loss, updates=120)
    new = {b: sum(float(loss(m, batch)) for batch in data) for b, m in lowered(model)}
    assert all(new[b] < old[b] for b in (1, 2, 3, 4))
    assert model.training and lora.get_rank(model) == 4
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(before), strict=True):
        torch.testing.assert_close(one.lora_A, other.lora_A, rtol=0, atol=0)
        share = one.lora_B / other.lora_B
        torch.testing.assert_close(share, share[:1, :1].expand_as(share))
        assert all(p.grad is None for p in one.parameters())


def lowered(model):
    for b in (1, 2, 3, 4):
        lora.set_rank(model, b)
        with torch.no_grad():
            yield b, model
    lora.set_rank(model, 4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64))
def test_between_the_fitted_ranks_values_are_interpolated(r):
    ladder = lora.RankSampler(r).ladder()
    matrix = interpolation(ladder)
    ranks = torch.arange(1, r + 1, dtype=torch.float32)
    assert matrix.shape == (r, len(ladder))
    # Linear in log b: the logarithm of the ranks themselves comes back.
    torch.testing.assert_close(matrix @ torch.tensor(ladder).log(), ranks.log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.sum(1), torch.ones(r))
    torch.testing.assert_close(matrix[[b - 1 for b in ladder]], torch.eye(len(ladder)))


def test_layers_of_a_smaller_rank_have_strengths_of_their_own_ranks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    lora.inject(model, ["0"], r=4)
    lora.inject(model, ["2"], r=2)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    lora.fit_strengths(model, batches(), loss)
    assert [len(layer.strength_at) for _, layer in lora_layers(model)] == [4, 2]
    assert all(layer.strength_at[-1] == 1 for _, layer in lora_layers(model))


def test_files_give_every_rank_as_it_is(tmp_path):
    model, x = with_tables(), torch.randn(5, 6)
    bare = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    wanted = {b: by_hand(model, x, b) for b in (1, 2, 3, 4)}
    lora.save_adapter(model, tmp_path / "whole")
    loaded = copy.deepcopy(bare)
    lora.load_adapter(loaded, tmp_path / "whole")
    for b in (1, 2, 3, 4):
        lora.set_rank(loaded, b)
        torch.testing.assert_close(loaded(x), wanted[b])
        cut_adapter(tmp_path / "whole", tmp_path / f"cut {b}", b)
        lora.save_adapter(model, tmp_path / f"saved {b}", b)
        one, other = (read_directory(tmp_path / f"{how} {b}") for how in ("cut", "saved"))
        assert one.facts.keys() == other.facts.keys() and one.config == other.config
        assert one.facts["strength_at"].keys() == {"0", "2"}
        for key, value in one.tensors.items():
            torch.testing.assert_close(value, other.tensors[key])
        stock = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / f"cut {b}")
        torch.testing.assert_close(stock(x), wanted[b])
        at_once = copy.deepcopy(bare)
        lora.load_adapter(at_once, tmp_path / "whole", rank=b)
        torch.testing.assert_close(at_once(x), wanted[b])
        for lower in range(1, b + 1):  # and what a cut holds, can be cut
            lora.set_rank(at_once, lower)
            torch.testing.assert_close(at_once(x), wanted[lower])
            cut_adapter(tmp_path / f"cut {b}", tmp_path / f"again {b} {lower}", lower)
            again = copy.deepcopy(bare)
            lora.load_adapter(again, tmp_path / f"again {b} {lower}")
            torch.testing.assert_close(again(x), wanted[lower])


def test_another_adapter_brings_its_own(tmp_path):
    lora.save_adapter(with_tables(), tmp_path / "with")
    lora.save_adapter(small_model(), tmp_path / "without")
    model = small_model()
    lora.load_adapter(model, tmp_path / "with")
    assert lora_layers(model)[1][1].strength_at == TABLE
    lora.load_adapter(model, tmp_path / "without")
    assert all(layer.strength_at is None for _, layer in lora_layers(model))


def test_inside_peft(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    model = get_peft_model(copy.deepcopy(base), DyLoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with pytest.warns(UserWarning, match=r"does not keep the strengths.*loralib.save_adapter"):
        lora.fit_strengths(model, batches(), loss)
    x = torch.randn(3, 6)
    for b in (1, 2, 4):
        lora.save_adapter(model, tmp_path / str(b), b)
        lora.set_rank(model, b)
        stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(b))
        torch.testing.assert_close(stock(x), model(x))
    with pytest.raises(ValueError, match=r"strengths that were learnt for each rank.*give no config"):
        DyLoraConfig.from_pretrained(tmp_path / "4")
    again = get_peft_model(copy.deepcopy(base), DyLoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    lora.load_adapter(again, tmp_path / "4")
    for b in (1, 2, 4):
        lora.set_rank(model, b)
        lora.set_rank(again, b)
        torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("way", ["order_components", "order_by_importance"])
def test_another_order_has_none(way):
    model = with_tables()
    if way == "order_components":
        lora.order_components(model)
    else:
        examples = [{name: value[:1] for name, value in batch.items()} for batch in batches()]
        lora.order_by_importance(model, examples, loss)
    assert all(layer.strength_at is None for _, layer in lora_layers(model))


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "no batches"), ([*batches(1), {"x": torch.full((2, 6), torch.nan), "y": torch.tensor([0, 1])}], "batch 2")],
)
def test_what_cannot_be_fitted_changes_nothing(data, message):
    model = with_tables().train()
    lora.set_rank(model, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.fit_strengths(model, data, loss)
    assert lora_layers(model)[1][1].strength_at == TABLE and lora.get_rank(model) == 2 and model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("data", [batches(1), [(torch.randn(4, 6), torch.zeros(4).long())]], ids=["dict", "pair"])
def test_a_model_without_a_loss_needs_one(data):
    class Named(nn.Sequential):
        def forward(self, x, y=None):
            return super().forward(x)

    model = Named(nn.Linear(6, 4))
    lora.inject(model, ["0"], r=2)
    with pytest.raises(TypeError, match="Named gives no loss for batch 1; give loss"):
        lora.fit_strengths(model, data)


def test_pairs_are_batches_too():
    one, other = small_model(), small_model()
    lora.fit_strengths(one, batches(), loss, updates=3)
    pairs = [(batch["x"], batch["y"]) for batch in batches()]
    lora.fit_strengths(
        other, pairs, lambda model, pair: nn.functional.cross_entropy(model(pair[0]), pair[1]), updates=3
    )
    for (_, a), (_, b) in zip(lora_layers(one), lora_layers(other), strict=True):
        assert a.strength_at == b.strength_at


@pytest.mark.parametrize(("option", "value"), [("updates", 0), ("accumulate", 1.5), ("rate", -1), ("rate", "fast")])
def test_numbers_out_of_range_are_named(option, value):
    with pytest.raises((ValueError, TypeError), match=f"{option} is {value!r}"):
        lora.fit_strengths(small_model(), batches(), loss, **{option: value})


def test_a_shared_factor_is_not_changed_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject(model, ["0", "1"], r=2)
    model[1].lora_B = model[0].lora_B
    with pytest.raises(ValueError, match="0 and 1 share a factor"):
        lora.fit_strengths(model, batches(), loss)


def test_convolutions_are_fitted_in_a_first_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    lora.inject(model, ["0"], r=4)
    nn.init.normal_(model[0].lora_B)
    batch = {"x": torch.randn(8, 3, 6, 6), "y": torch.arange(8) % 2}
    lora.fit_strengths(model, [batch], loss, updates=20)
    assert model[0].strength_at[0] != 1


@pytest.mark.parametrize("way", ["order_components", "load_adapter"])
@pytest.mark.parametrize("how", ["example", "gate"])
def test_a_gate_of_other_strengths_is_not_left(way, how, tmp_path):
    """What was set before runs at r_max afterwards, at which strengths do not matter."""
    model, x = with_tables(), torch.randn(3, 6)
    lora.save_adapter(small_model(), tmp_path / "other")
    lora.set_rank(model, torch.tensor([1, 2, 3])) if how == "example" else lora.set_matryoshka_gate(model)
    lora.order_components(model) if way == "order_components" else lora.load_adapter(model, tmp_path / "other")
    found = model(x)
    lora.set_rank(model, 4)
    torch.testing.assert_close(found, model(x))


def test_factors_that_are_drawn_anew_have_none():
    model = with_tables()
    model[0].reset_parameters()
    assert model[0].strength_at is None and model[2].strength_at == TABLE


def test_strengths_belong_to_the_weights_beside_them(tmp_path):
    """As a kill between two files, or another program that writes the weights anew, leaves them."""
    fitted, plain = with_tables(), small_model()
    for name, model in (("fitted", fitted), ("plain", plain)):
        lora.save_adapter(model, tmp_path / name)
    told = {name: (tmp_path / name / "dylora.json").read_text() for name in ("fitted", "plain")}
    (tmp_path / "plain/dylora.json").write_text(told["fitted"])
    lora.load_adapter(small_model(), tmp_path / "plain")
    (tmp_path / "fitted/dylora.json").write_text(told["plain"])
    with pytest.raises(ValueError, match="has not the strength_at of the weights"):
        lora.load_adapter(small_model(), tmp_path / "fitted")
    (tmp_path / "fitted/dylora.json").write_text(told["fitted"])
    weights = tmp_path / "fitted/adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without our words in it
    model = with_tables()
    lora.load_adapter(model, tmp_path / "fitted")
    assert all(layer.strength_at is None for _, layer in lora_layers(model))


def test_strengths_that_run_away_are_refused_and_leave_the_model():
    model = with_tables()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="give a lower rate"):
        lora.fit_strengths(model, batches(), loss, updates=1, rate=1e4)
    assert lora_layers(model)[1][1].strength_at == TABLE
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_a_loss_without_a_gradient_is_said():
    with pytest.raises(ValueError, match="batch 1 depends on no adapted layer"):
        lora.fit_strengths(small_model(), batches(), lambda model, batch: torch.ones(()))


def test_a_training_begins_without_them():
    model = with_tables()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = lora.RankSchedule(full_rank_share=0.0).resolve(4, "alpha/r")
    with pytest.warns(UserWarning, match="begins without them: fit them again"):
        for batch in schedule.over(batches(2), model, optimizer):
            loss(model, batch).backward()
            optimizer.step()
    assert all(layer.strength_at is None for _, layer in lora_layers(model))


def test_merged_and_spread_models_are_refused():
    model = small_model()
    examples = [{name: value[:1] for name, value in batch.items()} for batch in batches()]
    lora.order_components(model)
    lora.order_by_importance(model, examples, loss)
    with pytest.raises(ValueError, match="spread over the layers"):
        lora.fit_strengths(model, batches(), loss)
    model = small_model()
    lora_layers(model)[0][1].merge()
    with pytest.raises(RuntimeError, match="merged"):
        lora.fit_strengths(model, batches(), loss)
    assert all(layer.strength_at is None for _, layer in lora_layers(model))


@pytest.mark.parametrize(
    "wrong", [{"0": [1.0, 1.0]}, {"0": [0.5, -1, 1, 1]}, {"0": [1, 1, 1, 2]}, {"1": [1, 1, 1, 1]}, {"0": "x"}, [1]]
)
def test_damaged_strengths_are_one_sentence(wrong, tmp_path):
    lora.save_adapter(with_tables(), tmp_path / "a")
    facts = json.loads((tmp_path / "a/dylora.json").read_text())
    (tmp_path / "a/dylora.json").write_text(json.dumps(facts | {"strength_at": wrong}))
    with pytest.raises(ValueError, match=r"strength_at.*save the adapter anew"):
        lora.load_adapter(small_model(), tmp_path / "a")


def test_a_stock_adapter_can_be_fitted_and_is_stock_again(tmp_path):
    """LoRA of PEFT's, ordered: its low ranks need other strengths, and each cut is a plain adapter."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "peft")
    model = copy.deepcopy(base)
    lora.load_adapter(model, tmp_path / "peft")
    lora.order_components(model)
    lora.fit_strengths(model, batches(), loss)
    lora.save_adapter(model, tmp_path / "two", 2)
    assert not read_directory(tmp_path / "two").config["alpha_pattern"]
    lora.set_rank(model, 2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "two")(x), model(x))
