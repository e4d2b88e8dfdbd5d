"""One rank per example gives, for each example, what it gives alone at that rank; or it is refused."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.layout import Layout, LayoutError
from loralib.model import lora_layers

from .zoo import TINY, ZOO, Animal, BestTokens, FirstIsSequence, Mixture, frames, ids


def adapted(animal: Animal, r: int = 4) -> nn.Module:
    model = lora.inject(animal.build(), animal.targets, r=r).eval()
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


def dim_of(animal_batch) -> int:
    return 1 if animal_batch is frames else 0


def first_output(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def alone(model, inputs: dict, dim: int, i: int, rank: int):
    with lora.use_rank(model, rank):
        return first_output(model(**{name: x.narrow(dim, i, 1) for name, x in inputs.items()}))


@torch.no_grad()
def check(model, inputs: dict, ranks: torch.Tensor, dim: int) -> None:
    """Each example at its rank, against the example alone."""
    lora.set_rank(model, ranks)
    found = first_output(model(**inputs))
    out = 1 if dim == 1 and found.ndim == 3 else 0  # a sequence-first model without a head gives its sequence so
    for i, rank in enumerate(ranks.tolist()):
        expected = alone(model, inputs, dim, i, rank)
        error = (found.narrow(out, i, 1) - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, (i, rank, error)


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_each_example_at_its_rank_is_the_example_alone(animal):
    """Also where the sequence is as long as the batch, and on later batches of other shapes."""
    model = adapted(animal)
    for n, s in ((4, 4), (4, 7), (3, 4), (4, 3), (2, 9), (1, 5)):
        refused = (
            contextlib.nullcontext() if animal.served or n == 1 else pytest.raises(LayoutError, match="cannot run with")
        )
        with refused:
            check(model, animal.batch(n, s), torch.arange(n) % 5, dim_of(animal.batch))


MODELS = {
    "experts": (Mixture, ["0", "1", "shared_expert"], ids),
    "chosen tokens": (BestTokens, ["expert"], ids),
    "flattened": (lambda: FirstIsSequence(False), ["inner", "head"], frames),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 10_000),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_no_batch_is_silently_wrong(kind, seed, shapes):
    build, targets, batch = MODELS[kind]
    torch.manual_seed(seed)
    model = adapted(Animal(kind, build, batch, targets))
    for n, s in shapes:
        with contextlib.suppress(LayoutError):
            check(model, batch(n, s), torch.randint(0, 5, (n,)), dim_of(batch))


@pytest.mark.parametrize(
    "animal", [a for a in ZOO if a.name in ("OPT", "XLNet", "flattened, sequence first")], ids=lambda a: a.name
)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_the_sum_of_the_examples(animal, frozen):
    model = adapted(animal)
    for parameter in model.parameters():
        parameter.requires_grad = False
    factors = [f for _, layer in lora_layers(model) for f in (layer.lora_A, layer.lora_B)]
    for factor in factors:
        factor.requires_grad = True
    inputs, ranks, dim = animal.batch(4, 4), torch.tensor([1, 4, 2, 3]), dim_of(animal.batch)
    weights = [torch.randn(first_output(model(**inputs)).narrow(0, 0, 1).shape) for _ in ranks]
    lora.set_rank(model, ranks, frozen=frozen)
    output = first_output(model(**inputs))
    whole = torch.autograd.grad(sum((output.narrow(0, i, 1) * weights[i]).sum() for i in range(4)), factors)
    single = [torch.zeros_like(f) for f in factors]
    for i, rank in enumerate(ranks.tolist()):
        lora.set_rank(model, rank, frozen=frozen)
        one = first_output(model(**{name: x.narrow(dim, i, 1) for name, x in inputs.items()}))
        for sum_, part in zip(single, torch.autograd.grad((one * weights[i]).sum(), factors), strict=True):
            sum_ += part
    for found, expected in zip(whole, single, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def roberta(**more) -> nn.Module:
    config = tf.RobertaConfig(**TINY, max_position_embeddings=64, **more)
    return lora.inject(tf.RobertaForSequenceClassification(config), ["query", "value"], r=4)


def test_learning_leaves_no_trace():
    """Modes, states, weights, generators: as they were; a training pass draws the dropout that it would have drawn."""
    model = roberta().train()
    model.roberta.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    before, inputs, ranks = copy.deepcopy(model.state_dict()), ids(4, 6), torch.tensor([1, 4, 2, 3])
    other = copy.deepcopy(model)
    lora.declare_layout(other, 0)
    outputs = []
    for each in (model, other):
        torch.manual_seed(1)
        lora.set_rank(each, ranks)
        outputs.append(each(**inputs).logits)
    assert torch.equal(*outputs) and torch.equal(lora.get_rank(model), ranks)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(layer.layout == Layout() for _, layer in lora_layers(model))


def test_a_layer_that_is_first_reached_later_is_learnt_then():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.extra = nn.GRU(16, 16), nn.Linear(16, 16)

        def forward(self, src, use_extra=False):
            x, _ = self.mix(src)
            return self.extra(x) if use_extra else x

    model = adapted(Animal("gated", Gated, frames, ["extra"]))
    lora.set_rank(model, torch.tensor([1, 4, 2, 3]))
    with pytest.warns(UserWarning, match="extra: adapted, and not called in the first pass of Gated"):
        model(**frames(4, 4))
    inputs = frames(4, 4)
    with torch.no_grad():
        found = model(**inputs, use_extra=True)
        for i, rank in enumerate((1, 4, 2, 3)):
            with lora.use_rank(model, rank):
                assert torch.allclose(model(inputs["src"][:, i : i + 1], True), found[:, i : i + 1], atol=1e-4)


def test_beams_take_a_rank_for_each_row():
    model = lora.inject(
        tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, num_key_value_heads=2)), ["q_proj", "v_proj"], r=4
    ).eval()
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=3)
    inputs, ranks = ids(3, 5), torch.tensor([1, 4, 2])
    options = dict(num_beams=4, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    lora.set_rank(model, ranks)
    with pytest.raises(
        LayoutError, match=r"3 ranks are set, .* shape \(12, 5\); .* ranks.repeat_interleave\(num_beams\)"
    ):
        model.generate(**inputs, **options)
    lora.set_rank(model, ranks.repeat_interleave(4))
    found = model.generate(**inputs, **options)
    for i, rank in enumerate(ranks.tolist()):
        lora.set_rank(model, rank)
        alone = model.generate(**{name: x[i : i + 1] for name, x in inputs.items()}, **options)
        assert torch.equal(alone[0], found[i])


def test_what_needs_the_whole_batch_is_declared():
    class Contrast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 8)

        def forward(self, src):
            if len(src) < 2:
                raise ValueError("a contrast needs two")
            x = self.inner(src)
            return x @ x.T

    model, x, ranks = lora.inject(Contrast(), ["inner"], r=2), torch.randn(3, 16), torch.tensor([0, 1, 2])
    nn.init.normal_(model.inner.lora_B)
    lora.set_rank(model, ranks)
    with pytest.raises(
        LayoutError, match=r"one by one, .* \(a contrast needs two\); say it with loralib.declare_layout"
    ):
        model(x)
    lora.declare_layout(model, 0)
    rows = []
    for i, rank in enumerate(ranks.tolist()):
        model.inner.set_rank(rank)
        rows.append(model.inner(x[i : i + 1]))
    lora.set_rank(model, ranks)
    assert torch.allclose(model(x), torch.cat(rows) @ torch.cat(rows).T, atol=1e-5)
    with pytest.raises(ValueError, match="dim is 2; give 0"):
        lora.declare_layout(model, 2)


def test_a_dimension_that_nothing_tells_from_another_is_refused():
    model = lora.inject(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)), ["0", "2"], r=2)
    lora.set_rank(model, torch.tensor([1, 2, 1, 2]))
    with pytest.raises(
        LayoutError, match=r"several dimensions of 4 that could be the examples; .* loralib.declare_layout"
    ):
        model(torch.randn(4, 4, 16))
    assert model(torch.randn(4, 5, 16)).shape == (4, 5, 3)  # here only one can be


def test_a_layer_called_without_its_model_says_what_to_do():
    model = roberta()
    lora.set_rank(model, torch.tensor([1, 2, 3]))
    with pytest.raises(LayoutError, match="outside a call of the model"):
        model.roberta.encoder.layer[0].attention.self.query(torch.randn(3, 5, 16))
    lora.learn_layout(model, **ids(3, 5))
    assert model.roberta(**ids(3, 5)).last_hidden_state.shape == (3, 5, 16)


@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.name)
def test_at_ranks_gives_every_model_its_ranks(animal):
    """Those that cannot share a pass between ranks go rank by rank; outputs are cut where they hold the batch."""
    model, inputs = adapted(animal), animal.batch(3, 4)
    with torch.no_grad():
        for rank, output in lora.at_ranks(model, inputs, [1, 2, 4]):
            with lora.use_rank(model, rank):
                expected = first_output(model(**inputs))
            assert first_output(output).shape == expected.shape
            assert torch.allclose(first_output(output), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_at_ranks_of_examples_put_together_is_seen_while_the_adapter_is_fresh_or_weak():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            h = self.layer(x)
            return h - h.mean(0)

    model, x = lora.inject(Centred(), ["layer"], r=4).eval(), torch.randn(3, 6)
    with torch.no_grad():
        for strength in (0.0, 0.02, 1.0):
            nn.init.normal_(model.layer.lora_B).mul_(strength)
            before, wanted = model.layer.lora_B.clone(), []
            for b in range(1, 5):
                with lora.use_rank(model, b):
                    wanted.append(model(x))
            found = [output for _, output in lora.at_ranks(model, {"x": x}, iter(range(1, 5)))]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert torch.equal(model.layer.lora_B, before)


def test_at_ranks_of_outputs_that_put_examples_together():
    model = lora.inject(nn.Sequential(nn.Linear(6, 4)), ["0"], r=2).eval()
    nn.init.normal_(model[0].lora_B)
    inputs = {"x": torch.randn(3, 6)}

    def run(batch):
        x = model(batch["x"])
        return {"pairs": x @ x.T, "mean": x.mean(0)}

    with torch.no_grad():
        for rank, output in lora.at_ranks(model, inputs, [1, 2], run):
            with lora.use_rank(model, rank):
                expected = run(inputs)
            assert all(np.allclose(output[name], expected[name], atol=1e-5) for name in expected)
