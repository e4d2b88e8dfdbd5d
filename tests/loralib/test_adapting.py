"""A layer around another: it calls it, shares its parameters under their old names, and gives it back when merged."""

import copy
import io

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BartConfig, BartModel, FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import loralib as lora
from loralib.model import lora_layers


def randomise(model):
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B, std=0.3)


class Doubled(nn.Linear):
    """A Linear that computes in its own way."""

    def forward(self, x):
        return 2 * super().forward(x)


class Loud(nn.Linear):
    """A Linear that computes as such, and counts."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


BASES = {
    "linear": lambda: (nn.Linear(6, 5), torch.randn(3, 6)),
    "subclass": lambda: (Loud(6, 5), torch.randn(3, 6)),
    "Conv1D": lambda: (Conv1D(5, 6), torch.randn(3, 6)),
    "embedding": lambda: (nn.Embedding(9, 5, padding_idx=2), torch.randint(0, 9, (3, 4))),
    "scaled embedding": lambda: (Gemma3TextScaledWordEmbedding(9, 5, 2, embed_scale=3.0), torch.randint(0, 9, (3, 4))),
    "convolution": lambda: (nn.Conv2d(2, 4, 3, padding=1), torch.randn(3, 2, 5, 5)),
}


@pytest.mark.parametrize("kind", BASES)
def test_a_layer_holds_its_base_calls_it_and_gives_it_back(kind):
    base, x = BASES[kind]()
    model = nn.Sequential(base)
    before, names = model(x), [name for name, _ in model.named_parameters()]
    lora.inject(model, ["0"], r=3)
    layer = model[0]
    assert layer.base_layer is base and torch.equal(model(x), before)
    assert [name for name, _ in model.named_parameters()] == [*names, "0.lora_A", "0.lora_B"]
    assert layer.weight is base.weight
    randomise(model)
    lora.set_rank(model, torch.tensor([1, 2, 3]))
    mixed = model(x)
    for b in (1, 2, 3):
        lora.set_rank(model, b)
        assert torch.allclose(model(x)[b - 1], mixed[b - 1], atol=1e-5)
        assert torch.allclose(lora.merge(model, b)(x), model(x), atol=1e-5)
    wanted = model(x)
    plain = lora.merge(model, inplace=True)
    assert plain[0] is base and [name for name, _ in plain.named_parameters()] == names
    assert torch.allclose(plain(x), wanted, atol=1e-5)


def test_a_layer_made_by_its_constructor_is_its_own_base():
    layer = lora.Linear(4, 4, r=2)
    assert layer.base_layer is layer


def test_the_base_is_really_called_with_its_hooks():
    base = Loud(6, 5)
    seen = []
    base.register_forward_hook(lambda *_: seen.append(1))
    model = lora.inject(nn.Sequential(base), ["0"], r=2)
    calls = base.calls
    model(torch.randn(2, 6))
    assert base.calls == calls + 1 and seen[-1] == 1


@pytest.mark.parametrize("kind", ["linear", "scaled embedding"])
def test_copies_moves_and_pickles_keep_one_set_of_parameters(kind):
    base, x = BASES[kind]()
    model = lora.inject(nn.Sequential(base), ["0"], r=2)
    randomise(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        layer = other[0]
        assert layer.base_layer is not base and layer.base_layer.weight is layer.weight
        assert torch.equal(other(x), model(x))
        layer.double()
        assert layer.base_layer.weight.dtype == layer.lora_A.dtype == torch.float64
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
        assert layer.base_layer.weight is layer.weight
    model.eval()
    assert not base.training


def test_an_injected_layer_compiles_into_one_graph():
    model = lora.inject(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), ["0", "2"], r=2)
    randomise(model)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(4, 6)
    lora.learn_layout(model, x)
    for step in range(3):
        lora.set_rank(model, lora.RankSampler(2, seed=step)(step, 4))
        torch.testing.assert_close(compiled(x), model(x))


def test_what_computes_in_its_own_way_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Doubled(4, 4)

    model = Net()
    with pytest.raises(ValueError, match="second is a Doubled, which computes in its own way"):
        lora.inject(model, ["first", "second"], r=2)
    assert type(model.first) is nn.Linear
    assert list(model.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(lora.inject(model, ["first"], r=2).first) is lora.Linear


def falcon():
    config = FalconConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    )
    return FalconForCausalLM(config).eval(), ["query_key_value", "dense_h_to_4h"]


def bart():
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, scale_embedding=True,
    )  # fmt: skip
    return BartModel(config).eval(), ["embed_tokens", "q_proj"]


@pytest.mark.parametrize("make", [falcon, bart])
def test_models_with_subclasses_of_linear_and_embedding(make, tmp_path):
    """Falcon's linear layers and BART's scaled embeddings: exported, stock PEFT gives the same."""
    torch.manual_seed(1)
    model, targets = make()
    plain = copy.deepcopy(model)
    lora.inject(model, targets, r=3)
    randomise(model)
    ids = torch.randint(3, 40, (3, 6))
    first = lambda output: output[0]  # noqa: E731
    for b in (1, 3):
        with torch.no_grad(), lora.use_rank(model, b):
            wanted = first(model(ids))
            assert torch.allclose(first(lora.merge(model, b)(ids)), wanted, atol=1e-4)
        lora.save_adapter(model, tmp_path / str(b), rank=b)
        with torch.no_grad():
            found = first(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(b)).eval()(ids))
        assert torch.allclose(found, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="computes in its own way"):  # its positions come from elsewhere
        lora.inject(bart()[0], ["embed_positions"], r=2)


def test_a_tied_output_layer_stays_the_base_weight():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    lora.inject(model, ["wte"], r=2)
    assert model.lm_head.weight is model.transformer.wte.weight is model.transformer.wte.base_layer.weight
    assert set(model.state_dict()) >= {"transformer.wte.weight", "transformer.wte.lora_A"}


def test_a_module_under_two_names_is_one_adapted_layer_under_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(4, 4)
            self.other = nn.ModuleDict({"query": self.query})

        def forward(self, x):
            return self.query(x) + self.other["query"](x)

    for targets in (["query"], ["other.query"], "other.query"):
        model = lora.inject(Shared(), targets, r=2)
        assert model.query is model.other["query"] and isinstance(model.query, lora.Linear)
        randomise(model)
        x = torch.randn(3, 4)
        with lora.use_rank(model, 1):
            assert torch.allclose(model(x), 2 * model.query(x))
            wanted = model(x)
        merged = lora.merge(model, 1)
        assert torch.allclose(merged(x), wanted, atol=1e-5)
        assert merged.state_dict().keys() == Shared().state_dict().keys()


def test_a_module_under_two_parents_runs_at_every_rank():
    class Parent(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.Linear(4, 4)
            self.one, self.other = Parent(layer), Parent(layer)

        def forward(self, x):
            return 2 * self.one(x) + self.other(x)

    model = lora.inject(Shared(), ["layer"], r=3).eval()
    randomise(model)
    x = torch.randn(2, 4)
    with torch.no_grad():
        wanted = {}
        for b in range(4):
            with lora.use_rank(model, b):
                wanted[b] = model(x)
        for b, found in lora.at_ranks(model, {"x": x}, range(4), stack=False):
            assert torch.equal(found, wanted[b])
    assert not [key for key in lora.merge(model, 2).state_dict() if "lora_" in key]


def test_what_has_no_shape_yet_or_changes_its_own_weight_is_refused():
    with pytest.raises(ValueError, match=r"target_modules names .*, which cannot be adapted"):
        lora.inject(nn.Sequential(nn.LazyLinear(4)), ["0"], r=2)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0))
    with pytest.raises(ValueError, match=r"max_norm=1\.0, which rescales"):
        lora.inject(model, ["0"], r=2)
    assert list(model.state_dict()) == ["0.weight"] and model[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        lora.Embedding(10, 4, r=2, max_norm=1.0)


def test_a_subclass_keeps_its_own_modules():
    class Normed(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.inner = nn.Linear(1, 1)

    model = nn.Sequential(Normed(4, 4))
    keys = {*model.state_dict(), "0.lora_A", "0.lora_B"}
    assert lora.inject(model, ["0"], r=2).state_dict().keys() == keys
    assert model.to(torch.float64)[0].inner.weight.dtype == torch.float64


def test_heads_of_an_earlier_call_are_kept():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "head")})
    lora.inject(model, ["a"], r=2, modules_to_save=["head"])
    lora.inject(model, ["b"], r=2)
    lora.mark_only_lora_as_trainable(model)
    assert model["head"].weight.requires_grad


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"]])
def test_merging_one_of_two_tied_weights_is_told_in_the_configuration(targets, tmp_path):
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = lora.inject(GPT2LMHeadModel(config).eval(), targets, r=2)
    randomise(model)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        plain = lora.merge(model)
        assert model.config.tie_word_embeddings and not plain.config.tie_word_embeddings
        plain.save_pretrained(tmp_path)
        assert torch.allclose(GPT2LMHeadModel.from_pretrained(tmp_path).eval()(ids).logits, wanted, atol=1e-4)
    untied = lora.inject(GPT2LMHeadModel(config), ["c_attn"], r=2)
    assert lora.merge(untied).config.tie_word_embeddings


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_resizing_that_would_lose_an_adapter_is_refused(target):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
    build = lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))  # noqa: E731
    model = lora.inject(build(), [target, "q_proj"], r=2)
    with pytest.raises(ValueError, match=r"adapter for 50 tokens, which resize_token_embeddings\(60\) would lose"):
        model.resize_token_embeddings(60)
    assert len(model.resize_token_embeddings(50).weight) == 50
    other = lora.inject(build(), ["q_proj"], r=2)
    torch.nn.init.normal_(other.model.layers[0].self_attn.q_proj.lora_B)
    ids = torch.arange(6)[None]
    wanted = other(ids).logits
    other.resize_token_embeddings(60)
    torch.testing.assert_close(other(ids).logits[..., :50], wanted)
