"""What users of a model may do beside the usual, and what then must not go wrong without a word."""

import copy
import warnings

import pytest
import torch
from torch import nn

import loralib as lora
from loralib.model import lora_layers


def filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


class Centred(nn.Module):
    """Puts the examples together where a flag says so, or where it is given something to look at."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, centre=False, support=None):
        h = self.fc(x)
        h = h - h.mean(0) if centre else h
        return h if support is None else h + support.sum(0)


@pytest.mark.parametrize("how", ["flag", "closure", "support"])
def test_ranks_go_one_by_one_where_a_call_puts_examples_together(how):
    """Also after calls that do not, of the same shapes."""
    model, x = filled(lora.inject(Centred(), ["fc"], r=4)).eval(), torch.randn(4, 8)
    more = {"flag": {"centre": True}, "closure": {}, "support": {"support": torch.randn(4, 8)}}[how]

    def runs(centre):
        return (lambda batch: model(**batch, centre=centre)) if how == "closure" else None

    with torch.no_grad():
        list(lora.at_ranks(model, {"x": x}, [1, 2, 3], runs(False)))
        found = list(lora.at_ranks(model, {"x": x, **more}, [1, 2, 3], runs(True)))
        for rank, output in found:
            with lora.use_rank(model, rank):
                alone = model(x, centre=how == "closure", **more) if how != "flag" else model(x, centre=True)
            torch.testing.assert_close(output, alone)


def test_an_input_with_as_many_rows_as_the_batch_by_chance_goes_rank_by_rank():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1)
    model = filled(lora.inject(encoder, ["linear1", "linear2"], r=4)).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad():
        for n in (3, 4):  # 4 examples of 4 tokens, whose mask is (4, 4)
            inputs = {"src": torch.randn(n, 4, 8), "mask": mask}
            for rank, output in lora.at_ranks(model, inputs, [1, 2, 3]):
                with lora.use_rank(model, rank):
                    torch.testing.assert_close(output, model(**inputs), atol=1e-5, rtol=1e-4)


class NeedsTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if len(x) < 2:
            raise ValueError("needs two examples")
        return self.fc(x) - self.fc(x).mean(0)


def test_ranks_of_examples_that_are_no_longer_set_ask_for_nothing():
    model, x = filled(lora.inject(NeedsTwo(), ["fc"], r=4)), torch.randn(4, 4)
    lora.set_rank(model, 2)
    wanted = model(x)
    with lora.use_rank(model, torch.tensor([1, 2, 3, 4])):
        pass
    torch.testing.assert_close(model(x), wanted)
    with torch.no_grad():
        for rank, output in lora.at_ranks(model.eval(), {"x": x}, [1, 2, 3]):
            with lora.use_rank(model, rank):
                torch.testing.assert_close(output, model(x))


def test_a_model_that_is_compiled_in_place_learns_where_examples_stand():
    model, x = filled(lora.inject(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), ["0"], r=4)), torch.randn(4, 6)
    plain = copy.deepcopy(model)
    model.compile(backend="eager")
    for each in (model, plain):
        lora.set_rank(each, torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(model(x), plain(x))
    torch._dynamo.reset()  # it remembers what it compiled of torch's own modules


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_models_with_results_in_attributes_are_merged_and_get_adapters(tmp_path):
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        nn.utils.weight_norm(model[1])
        return model

    model, x = filled(lora.inject(net(), ["0"], r=2)), torch.randn(3, 4)
    lora.save_adapter(model, tmp_path)
    again = net()
    lora.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(lora.merge(model)(x), model(x))
    p = nn.Parameter(torch.zeros(2))
    lora.set_gate(model, p.sigmoid())
    wanted = model(x)
    torch.testing.assert_close(lora.merge(model)(x), wanted)


def test_a_dropout_is_saved_whichever_layer_is_the_first(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    model = lora.inject(net(), ["0", "1"], r=2, lora_dropout=0.25)
    lora.save_adapter(model, tmp_path / "one")
    again = net()
    lora.load_adapter(again, tmp_path / "one")
    assert again[1].lora_dropout.p == 0.25
    lora.inject(model, ["2"], r=2, lora_dropout=0.5)
    with pytest.warns(UserWarning, match=r"several dropouts \(0.25, 0.5\)"):
        lora.save_adapter(model, tmp_path / "two")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_part_is_left_alone():
    model = lora.inject(nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 2))), ["0"], r=2)
    assert filled(model)(torch.randn(3, 6)).shape == (3, 2)


def test_another_default_device_changes_nothing():
    """As of those who set a GPU; what is made on the way stands on the CPU or with the weights."""
    model, x = filled(lora.inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), ["0", "1"], r=4)), torch.randn(4, 6)
    other, ranks = copy.deepcopy(model), torch.tensor([1, 2, 3, 4])
    batches = [{"input": x[i : i + 1]} for i in range(4)]
    found = []
    for each, device in ((model, "cpu"), (other, "meta")):
        with torch.device(device):
            lora.set_rank(each, ranks)
            outputs = [each(x)]
            with torch.no_grad():
                outputs += [output for _, output in lora.at_ranks(each, {"input": x}, [1, 3])]
            importance = lora.component_importance(each, batches, lambda m, batch: m(**batch).square().mean())
            outputs += importance.values()
            drawn = lora.RankSampler(4)(0, 4)
            lora.set_matryoshka_gate(each)
            outputs += [drawn, each(x)]
            lora.order_components(each)
        found.append(outputs)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_factors_that_are_not_finite_are_not_ordered():
    model = filled(lora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], r=2))
    model[1].lora_B.data[0, 0] = float("nan")
    before = model[0].lora_A.detach().clone()
    with pytest.raises(ValueError, match="1 holds a number that is not finite"):
        lora.order_components(model)
    assert torch.equal(model[0].lora_A, before)


def test_a_merge_under_autocast_is_as_exact_as_without():
    model = filled(lora.inject(nn.Sequential(nn.Linear(32, 32)), ["0"], r=4))
    wanted = lora.merge(model)[0].weight
    with torch.autocast("cpu", torch.bfloat16):
        merged = lora.merge(model)[0].weight
        model[0].merge()
    assert torch.equal(merged, wanted) and torch.equal(model[0].weight, wanted)


def test_a_replica_computes_with_its_own_weights():
    """As nn.DataParallel makes them: copies that share modules, with parameters of their own."""
    model, x = filled(lora.inject(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2)), torch.randn(3, 4)
    wanted = model(x)
    replica = model[0]._replicate_for_data_parallel()
    for name, parameter in model[0]._parameters.items():
        setattr(replica, name, 2 * parameter.detach())
    with torch.no_grad():
        layer = model[0]
        update = layer.strength() * x @ (2 * layer.lora_A).T @ (2 * layer.lora_B).T
        torch.testing.assert_close(replica(x), x @ (2 * layer.weight).T + 2 * layer.bias + update)
    torch.testing.assert_close(model(x), wanted)


def test_no_warning_where_all_names_are_the_models():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], r=2, exclude_modules=["1"])


def test_a_layer_is_called_as_torchs_are():
    layer, x = lora.Linear(4, 3, r=2), torch.randn(2, 4)
    torch.testing.assert_close(layer(input=x), layer(x))


def test_factors_that_layers_share_are_not_turned():
    model = filled(lora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"], r=2))
    model[1].lora_A = model[0].lora_A
    before = model[0].lora_B.detach().clone()
    with pytest.raises(ValueError, match="0 and 1 share a factor"):
        lora.order_components(model)
    assert torch.equal(model[0].lora_B, before)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda m: lora.inject(m, [None], r=2), r"target_modules is \[None\]"),
        (lambda m: lora.inject(m, ["0"], r=2, exclude_modules=5), "exclude_modules is 5"),
        (lambda m: lora.inject(m, ["0"], r=2, rank_pattern=["0"]), "rank_pattern is .* dictionary"),
        (lambda m: lora.inject(m, ["0"], r=2, lora_dropout=None), "lora_dropout is None"),
        (lambda m: lora.RankSchedule(p="0.1"), "p is '0.1'"),
        (lambda m: list(lora.RankSchedule().resolve(r_max=2).over([], lora.inject(m, ["0"], r=2), accumulate=0)), "accumulate is 0"),
        (lambda m: lora.set_matryoshka_gate(lora.inject(m, ["0"], r=2), []), "ranks is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(nn.Sequential(nn.Linear(4, 4)))


def test_ranks_may_be_unsigned():
    model = filled(lora.inject(nn.Sequential(nn.Linear(4, 4)), ["0"], r=2))
    lora.set_rank(model, torch.tensor([1, 2], dtype=torch.uint16))
    assert lora.get_rank(model).tolist() == [1, 2]
