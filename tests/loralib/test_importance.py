"""Importance of components, and ranks that it spreads over the layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.importance import spread
from loralib.model import adapter_parameters, lora_layers
from loralib.parts import component_size


def small_model(scaling="alpha/r"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))
    lora.inject(model, ["0", "2", "4"], r=3, lora_alpha=6, scaling=scaling)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def examples(n=12):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(1, 6, generator=generator), "y": torch.tensor([i % 4])} for i in range(n)]


def loss(model, example):
    return nn.functional.cross_entropy(model(example["x"]), example["y"])


def test_importance_is_the_mean_square_of_the_losses_slope_in_each_component():
    """Against differences of the loss where one component is a little stronger."""
    model = small_model().double()
    found = lora.component_importance(
        model, [{k: v.double() if k == "x" else v for k, v in e.items()} for e in examples(4)], loss
    )
    step = 1e-5
    for name, _ in lora_layers(model):
        for j in range(3):
            squares = []
            for example in examples(4):
                example["x"] = example["x"].double()
                values = []
                for factor in (1 + step, 1 - step):
                    other = copy.deepcopy(model)
                    other.get_submodule(name).lora_B.data[:, j] *= factor
                    values.append(loss(other, example).item())
                squares.append(((values[0] - values[1]) / (2 * step)) ** 2)
            assert float(found[name][j]) == pytest.approx(sum(squares) / 4, rel=1e-4)


def test_mode_ranks_and_gradients_are_kept():
    model = small_model().train()
    lora.set_rank(model, 2)
    lora.component_importance(model, examples(3), loss)
    assert model.training and lora.get_rank(model) == 2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "loss_of", "sentence"),
    [
        ([], loss, "no examples"),
        (examples(2), lambda model, example: model(example["x"])[0], "a finite number is needed"),
        (examples(2), lambda model, example: loss(model, example) * float("nan"), "example 1 is nan"),
    ],
)
def test_what_cannot_be_measured_changes_nothing(given, loss_of, sentence):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        lora.order_by_importance(model, given, loss_of)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(layer.components_at is None for _, layer in lora_layers(model))


def test_one_strength_is_needed():
    with pytest.raises(ValueError, match="this adapter has 'alpha/b'"):
        lora.order_by_importance(small_model("alpha/b"), examples(), loss)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_are_nested_within_budget_and_the_best(data):
    layers = data.draw(st.integers(1, 4))
    ranks = data.draw(st.lists(st.integers(1, 5), min_size=layers, max_size=layers))
    numbers = data.draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    scores = [
        data.draw(st.lists(st.floats(0, 100, allow_nan=False), min_size=r, max_size=r, unique=True)) for r in ranks
    ]
    names = [f"l{i}" for i in range(layers)]
    sizes = dict(zip(names, numbers, strict=True))
    counts = spread({n: torch.tensor(s, dtype=torch.float64) for n, s in zip(names, scores, strict=True)}, sizes)
    r_max = max(ranks)
    assert {len(each) for each in counts.values()} == {r_max}
    density = {
        (n, j): s / sizes[n] for n, own in zip(names, scores, strict=True) for j, s in enumerate(sorted(own)[::-1])
    }
    for b in range(1, r_max + 1):
        kept = {n: counts[n][b - 1] for n in names}
        budget = sum(sizes[n] * min(b, r) for n, r in zip(names, ranks, strict=True))
        used = sum(sizes[n] * k for n, k in kept.items())
        assert used <= budget and all(counts[n][b - 2] <= kept[n] for n in names if b > 1)
        inside = [value for (n, j), value in density.items() if j < kept[n]]
        outside = {key: value for key, value in density.items() if key[1] >= kept[key[0]]}
        if outside:
            best = max(outside.values())
            assert not inside or min(inside) >= best
            # the next best would not have fitted
            assert any(used + sizes[n] > budget for (n, _), value in outside.items() if value == best)
    assert all(counts[n][-1] == r for n, r in zip(names, ranks, strict=True))


def spread_model():
    model = small_model()
    model[2].lora_B.data *= 0.01  # matters least: at rank 1 it has no component, and another layer has two
    lora.order_components(model)
    lora.order_by_importance(model, examples(), loss)
    return model


def plain_at(model, b):
    """The model with all but the components of rank b taken away, from the counts alone."""
    cut = copy.deepcopy(model)
    for _, layer in lora_layers(cut):
        layer.lora_B.data[:, layer.components_at[b - 1] :] = 0
        layer.components_at = None
    lora.set_rank(cut, 3)
    return cut


def test_at_r_max_nothing_changes_and_below_each_layer_runs_at_its_part():
    model = small_model()
    x = torch.randn(5, 6)
    before = model(x)
    lora.order_components(model)
    lora.order_by_importance(model, examples(), loss)
    torch.testing.assert_close(model(x), before)
    parts = [layer.components_at for _, layer in lora_layers(model)]
    assert any(part != (1, 2, 3) for part in parts)  # or this would show nothing
    cuts = [plain_at(model, b)(x) for b in (1, 2, 3)]
    weights = torch.tensor([[0.5, 0.5, 0.0], [0, 0, 1.0], [1.0, 0, 0], [0, 0.25, 0.75], [0.2, 0.3, 0.5]])
    for b in (1, 2, 3):
        lora.set_rank(model, b)
        torch.testing.assert_close(model(x), cuts[b - 1])
        assert lora.get_rank(model) == b
        sizes = [component_size(layer) * layer.components_at[b - 1] for _, layer in lora_layers(model)]
        assert adapter_parameters(model, b) == sum(sizes)
    each = torch.tensor([1, 3, 2, 0, 1])
    lora.set_rank(model, each)
    wanted = torch.stack([cuts[b - 1][i] for i, b in enumerate(each.tolist()) if b])
    torch.testing.assert_close(model(x)[each > 0], wanted)
    assert lora.get_rank(model).tolist() == each.tolist()
    lora.set_rank(model, weights)
    gates = {name: layer.state.gate for name, layer in lora_layers(model)}
    for name, layer in lora_layers(model):
        own = torch.tensor([[float(j < c) for j in range(3)] for c in layer.components_at])
        torch.testing.assert_close(gates[name], weights @ own * 2)
    for rank, output in lora.at_ranks(model.eval(), {"input": x}, [1, 2, 3]):
        torch.testing.assert_close(output, cuts[rank - 1])
    torch.testing.assert_close(lora.merge(model, rank=1)(x), cuts[0])


def test_frozen_training_has_no_component_of_its_own_there():
    with pytest.raises(ValueError, match="no component is the rank's own"):
        lora.set_rank(spread_model(), 2, frozen=True)


def test_ordering_anew_ends_the_spread():
    model = spread_model()
    lora.order_components(model)
    assert all(layer.components_at is None for _, layer in lora_layers(model))


@pytest.mark.parametrize("b", [1, 2, 3])
def test_an_adapter_is_saved_cut_and_loaded_with_it(b, tmp_path):
    from loralib.adapters.directory import cut_adapter, read_directory

    model, x = spread_model(), torch.randn(4, 6)
    lora.save_adapter(model, tmp_path / "whole")
    lora.save_adapter(model, tmp_path / "cut", rank=b)
    cut_adapter(tmp_path / "whole", tmp_path / "of_file", b)
    own, of_file = read_directory(tmp_path / "cut"), read_directory(tmp_path / "of_file")
    assert own.tensors.keys() == of_file.tensors.keys() and own.parameters()[0] == adapter_parameters(model, b)
    assert all(torch.equal(value, of_file.tensors[key]) for key, value in own.tensors.items())
    assert own.config["rank_pattern"] == of_file.config["rank_pattern"] and own.rank == b
    with torch.no_grad(), lora.use_rank(model, b):
        wanted = model(x)
    torch.manual_seed(0)
    base = lambda: nn.Sequential(*[copy.deepcopy(getattr(m, "base_layer", m)) for m in lora.merge(model, rank=0)])  # noqa: E731
    cut_adapter(tmp_path / "cut", tmp_path / "again", b)  # a layer may hold more than b components; all are kept
    for directory, rank in (("cut", None), ("cut", b), ("again", None), ("of_file", None), ("whole", b)):
        other = base()
        lora.load_adapter(other, tmp_path / directory, rank=rank)
        torch.testing.assert_close(other(x), wanted)
    other = base()
    lora.load_adapter(other, tmp_path / "whole")
    with lora.use_rank(other, b):
        torch.testing.assert_close(other(x), wanted)
    assert [layer.components_at for _, layer in lora_layers(other)] == [
        layer.components_at for _, layer in lora_layers(model)
    ]
    lora.load_adapter(model, tmp_path / "whole")  # into one that has layers


def test_counts_that_are_not_the_files_are_refused(tmp_path):
    import json

    lora.save_adapter(spread_model(), tmp_path / "a")
    facts = json.loads((tmp_path / "a/dylora.json").read_text())
    for wrong, sentence in (
        ({"0": [1, 2]}, "for other ranks"), ({"0": [1, 2, 7]}, "for other ranks"), ({"0": [2, 1, 3]}, "rising counts"),
        ([1], "rising counts"), ({"0": [1, 2, 3], "2": [1, 2]}, "rising counts"),
    ):  # fmt: skip
        (tmp_path / "a/dylora.json").write_text(json.dumps(facts | {"components_at": wrong}))
        with pytest.raises(ValueError, match=sentence):
            lora.load_adapter(nn.Sequential(nn.Linear(6, 9)), tmp_path / "a")


def test_inside_peft_and_in_stock_peft(roberta_checkpoint, tmp_path):
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from loralib.peft import DyLoraConfig

    def stock():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)

    ids = torch.arange(5, 17).reshape(2, 6)
    model = get_peft_model(
        stock(), DyLoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    lora.order_by_importance(model, [{"input_ids": ids[i : i + 1], "labels": torch.tensor([i])} for i in (0, 1)])
    parts = {name: layer.components_at for name, layer in lora_layers(model)}
    assert any(0 in part for part in parts.values())
    lora.save_adapter(model, tmp_path / "cut", rank=1)
    lora.save_adapter(model, tmp_path / "whole")
    lora.set_rank(model.eval(), 1)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(stock(), tmp_path / "cut").eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)
        assert sum(hasattr(module, "lora_A") for module in theirs.modules()) == sum(
            part[0] > 0 for part in parts.values()
        )
        again = get_peft_model(
            stock(), DyLoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
        )
        lora.load_adapter(again, tmp_path / "whole")
        lora.set_rank(again.eval(), 1)
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_the_mode_of_every_module_is_kept():
    model = small_model().train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    lora.component_importance(model, examples(2), lambda m, example: F.cross_entropy(m(example["x"]), example["y"]))
    assert [module.training for module in model.modules()] == modes and not model[2].base_layer.training
