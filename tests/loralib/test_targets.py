"""Which layers are adapted: as PEFT's LoraConfig would choose them, with its words; and in which precision."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import loralib as lora
from loralib.model import lora_layers
from loralib.targets import usual_targets

TINY = dict(vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)


def build(kind):
    torch.manual_seed(0)
    small = {**TINY, "num_key_value_heads": 2}
    makers = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TINY)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=32)
        ),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**small)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
        ),
    }
    return makers[kind]()


def theirs(kind, **options):
    """{name: (r, alpha)} of the layers that PEFT adapts."""
    task = "SEQ_CLS" if "bert" in kind else "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    model = get_peft_model(build(kind), LoraConfig(task_type=task, **({"r": 4, "lora_alpha": 8} | options)))
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }  # fmt: skip


def ours(kind, target_modules=None, **options):
    model = lora.inject(build(kind), target_modules, **({"r": 4, "lora_alpha": 8} | options))
    return {name: (layer.r, layer.lora_alpha) for name, layer in lora_layers(model)}


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "mistral", "t5"])
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_all_linear_and_the_usual_ones_are_pefts(kind, targets):
    found = ours(kind, targets)
    assert found == theirs(kind, **({} if targets is None else {"target_modules": targets})) and found


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.[02]\.mlp\.\w+_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.0\..*": 3}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"model.layers.1.self_attn.q_proj": 32}},
    ],
    ids=str,
)
def test_patterns_choose_what_pefts_do(options):
    assert ours("llama", **options) == theirs("llama", **options)


def test_layers_of_other_ranks_are_saved_and_load_in_peft(tmp_path):
    from peft import PeftModel

    model = lora.inject(
        build("llama"), ["q_proj", "v_proj"], r=4, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 3}
    )
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    ids = torch.arange(10)[None]
    for rank in (1, 3, 4):
        lora.save_adapter(model, tmp_path / str(rank), rank=rank)
        again = PeftModel.from_pretrained(build("llama"), tmp_path / str(rank)).eval()
        with torch.no_grad(), lora.use_rank(model.eval(), rank):
            torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_modules": ["qproj"]}, "Did you mean q_proj?"),
        ({"target_modules": ["lm"]}, "it has .*down_proj.*q_proj"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "'k_proj', which no adapted layer's name ends with"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}, "rank of model.layers.0.self_attn.q_proj is 0"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform = \[7\] leaves out all"),
        ({"target_modules": ["q_proj"], "exclude_modules": "q_proj"}, "exclude_modules = 'q_proj' leaves out all"),
        ({"target_modules": ["q_proj"], "lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "it needs layers_to_transform"),
        ({"target_modules": ["q_proj"], "exclude_modules": "("}, "exclude_modules = '\\(' is no regular expression"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"(": 2}}, "is no regular expression"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_said_with_what_could_have(options, sentence):
    model = build("llama")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=sentence):
        lora.inject(model, **options)
    assert [name for name, _ in model.named_modules()] == before


def test_a_model_without_layers_to_adapt_says_what_it_has():
    with pytest.raises(ValueError, match="no linear layer, embedding or Conv2d, only LayerNorm, LSTM"):
        lora.inject(nn.Sequential(nn.LayerNorm(4), nn.LSTM(4, 4)), "all-linear")
    with pytest.raises(ValueError, match="no usual layers for Sequential; give target_modules"):
        lora.inject(nn.Sequential(nn.Linear(4, 4)), None)


def test_without_peft_the_usual_layers_are_asked_for(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft.utils.constants", None)
    with pytest.raises(ValueError, match="looked up in PEFT, which is not installed; give target_modules"):
        usual_targets(build("llama"))


@pytest.mark.parametrize(
    ("base", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factors_are_fp32_on_a_narrow_base_as_in_peft(base, autocast, kind):
    targets = ["q_proj", "v_proj"] if kind == "llama" else ["c_attn"]
    model = lora.inject(build(kind).to(base), targets, r=4, lora_alpha=8)
    assert {layer.lora_A.dtype for _, layer in lora_layers(model)} == {torch.float32}
    peft = get_peft_model(build(kind).to(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, layer in lora_layers(model):
        other = peft.get_submodule(f"base_model.model.{name}")
        for ours_, theirs_ in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            values = torch.randn(ours_.shape, generator=generator) * 0.3
            ours_.data.copy_(values)
            theirs_["default"].weight.data.copy_(values)
    model.eval(), peft.eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        wanted = peft(ids, labels=ids)
        for rank in (4, torch.tensor([4, 4])):
            lora.set_rank(model, rank)
            found = model(ids, labels=ids)
            assert found.logits.dtype == wanted.logits.dtype
            torch.testing.assert_close(found.logits, wanted.logits, atol=2e-2, rtol=2e-2)
            found.loss.backward()
            grads = [layer.lora_B.grad for _, layer in lora_layers(model)]
            assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
            model.zero_grad()
    narrow = lora.inject(build(kind).to(base), targets, r=4, autocast_adapter_dtype=False)
    assert {layer.lora_A.dtype for _, layer in lora_layers(narrow)} == {base}


def test_frozen_training_on_a_narrow_base():
    model = lora.inject(build("llama").to(torch.bfloat16), ["q_proj"], r=4)
    lora.set_rank(model, 2, frozen=True)
    ids = torch.arange(12).reshape(2, 6)
    model(ids, labels=ids).loss.backward()
    for _, layer in lora_layers(model):
        assert layer.lora_B.grad[:, 1].abs().sum() > 0 and not layer.lora_B.grad[:, [0, 2, 3]].any()
    lora.set_rank(model, torch.tensor([2, 3]), frozen=True)
    assert model(ids, labels=ids).logits.dtype == torch.bfloat16
