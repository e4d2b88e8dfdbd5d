"""DyLoRA inside PEFT: a PeftModel with ranks computes what a model after lora.inject computes, and PEFT's own still works."""

import copy
import inspect
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as stock
from torch import nn

import loralib as lora
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig, layer_classes

from .helpers import IDS
from .helpers import logits_at as out

SMALL = dict(vocab_size=120, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TARGETS = {"llama": ["q_proj", "v_proj", "embed_tokens"], "bert": ["query", "value"], "gpt2": ["c_attn"],
           "mixtral": ["q_proj", "o_proj"]}  # fmt: skip


def build(kind="llama"):
    torch.manual_seed(0)
    makers = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=120, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
        ),
    }
    return makers[kind]().eval()


def strong(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def within(kind="llama", r=4, **options):
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    settings = {"r": r, "lora_alpha": 8, "target_modules": TARGETS[kind], "task_type": task} | options
    return strong(get_peft_model(build(kind), DyLoraConfig(**settings)).eval())


def beside(kind, model, tmp_path, scaling="alpha/r"):
    """The same adapter in a model after lora.inject."""
    lora.save_adapter(model, tmp_path / "twin")
    other = build(kind)
    lora.load_adapter(other, tmp_path / "twin")
    assert {layer.scaling for _, layer in lora_layers(other)} == {scaling}
    return other.eval()


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    ("options", "scaling"),
    [({}, "alpha/r"), ({"rank_scaling": "alpha/b"}, "alpha/b"), ({"use_rslora": True}, "alpha/sqrt(b)")],
)
def test_it_computes_what_a_model_after_inject_computes(kind, options, scaling, tmp_path):
    model = within(kind, **options)
    other = beside(kind, model, tmp_path, scaling)
    weights = torch.tensor([[0.5, 0, 0, 0.5], [1.0, 0, 0, 0], [0, 0.2, 0.8, 0]])
    for rank in (0, 1, 2, 3, 4, torch.tensor([1, 4, 2]), torch.tensor([0, 3, 3]), weights):
        torch.testing.assert_close(out(model, rank), out(other, rank), atol=1e-6, rtol=1e-5)
    mixed = out(model, torch.tensor([1, 4, 2]))
    for row, rank in enumerate((1, 4, 2)):
        torch.testing.assert_close(mixed[row], out(model, rank)[row], atol=1e-5, rtol=1e-4)
    model.train(), other.train()
    for rank in (2, torch.tensor([1, 4, 2])):
        for each in (model, other):
            for module in each.modules():
                module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
            lora.set_rank(each, rank)
            each(input_ids=IDS).logits.square().mean().backward()
        grads = [[layer.lora_B.grad for _, layer in lora_layers(each)] for each in (model, other)]
        for one, twin in zip(*grads, strict=True):
            torch.testing.assert_close(one, twin, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_batch_at_every_rank_is_the_batch_at_that_rank(kind, stack):
    """What is computed once for all ranks is not what an adapter is in."""
    model, inputs = within(kind), {"input_ids": torch.randint(3, 100, (3, 7))}
    with torch.no_grad():
        wanted = []
        for b in range(1, 5):
            with lora.use_rank(model, b):
                wanted.append(model(**inputs).logits)
        for (_, output), logits in zip(lora.at_ranks(model, inputs, range(1, 5), stack=stack), wanted, strict=True):
            torch.testing.assert_close(output.logits, logits, rtol=1e-3, atol=1e-5)


def test_what_peft_marks_and_keeps_is_left_to_it():
    model = within()
    with pytest.raises(ValueError, match="PEFT's to keep; get_peft_model has marked what trains"):
        lora.mark_only_lora_as_trainable(model)
    with pytest.raises(ValueError, match=r"take peft\.get_peft_model_state_dict"):
        lora.lora_state_dict(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [2, 4])
def test_pefts_merging_is_at_the_rank(kind, rank):
    model = within(kind)
    wanted, whole = out(model, rank), out(model, 0)
    lora.set_rank(model, rank)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(out(merged), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out(lora.merge(model, rank)), wanted, atol=1e-5, rtol=1e-4)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(out(model), wanted, atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="merged"):
            lora.set_rank(model, 1)
        model.unmerge_adapter()
        torch.testing.assert_close(out(model), wanted, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(out(model), whole)


def test_what_is_saved_is_a_plain_lora_for_stock_peft(tmp_path):
    model = within("llama", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "whole")
    lora.save_adapter(model, tmp_path / "two", rank=2)
    stored = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert "rank_scaling" not in stored and stored["peft_type"] == "LORA"
    for directory, rank in (("whole", 4), ("two", 2)):
        plain = PeftModel.from_pretrained(build(), tmp_path / directory).eval()
        assert not lora.model.has_lora(plain)
        torch.testing.assert_close(out(plain), out(model, rank), atol=1e-5, rtol=1e-4)
    config = DyLoraConfig.from_pretrained(str(tmp_path / "two"))
    again = PeftModel.from_pretrained(build(), tmp_path / "two", config=config, is_trainable=True).eval()
    assert lora.max_rank(again) == 2
    torch.testing.assert_close(out(again, 1), out(model, 1), atol=1e-5, rtol=1e-4)
    fresh = get_peft_model(build(), DyLoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])).eval()
    lora.load_adapter(fresh, tmp_path / "two")
    torch.testing.assert_close(out(fresh, 2), out(model, 2), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="give DyLoraConfig the r of the file"):
        lora.load_adapter(model, tmp_path / "two")


def test_order_components_turns_the_moments_along():
    model = within().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    before = out(model, 4)
    _, layer = lora_layers(model)[-1]
    moment, factor = optimizer.state[layer.lora_B]["exp_avg"].clone(), layer.lora_B.detach().clone()
    lora.order_components(model, optimizer)
    torch.testing.assert_close(out(model, 4), before, atol=1e-5, rtol=1e-4)
    turned = torch.linalg.lstsq(factor, layer.lora_B.detach()).solution  # B' = B T, and so the gradient's mean goes
    assert not torch.allclose(optimizer.state[layer.lora_B]["exp_avg"], moment)
    wanted = moment @ torch.linalg.pinv(turned).T
    torch.testing.assert_close(optimizer.state[layer.lora_B]["exp_avg"], wanted, atol=1e-5, rtol=1e-3)


def test_several_adapters_a_plain_one_beside():
    model = within("llama", target_modules=["q_proj", "v_proj"])
    ranked = out(model, 2)
    model.add_adapter("plain", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", DyLoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    model = strong(model).eval()
    plain = get_peft_model(build(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])).eval()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "plain" in getattr(module, "lora_A", {}):
            twin = plain.get_submodule(name)
            twin.lora_A["default"].weight.data.copy_(module.lora_A["plain"].weight)
            twin.lora_B["default"].weight.data.copy_(module.lora_B["plain"].weight)
    model.set_adapter("plain")
    assert not lora.model.has_lora(model)
    torch.testing.assert_close(out(model), out(plain), atol=1e-6, rtol=1e-5)
    model.set_adapter("other")
    assert lora.max_rank(model) == 2
    model.set_adapter("default")
    assert lora.max_rank(model) == 4 and ranked.shape == out(model, 2).shape
    model.delete_adapter("other")
    assert lora.max_rank(model) == 4


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"]])
def test_ranks_on_layers_of_a_plain_adapter_are_refused_and_not_trained_plainly(targets):
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert not lora.model.has_lora(model)
    model.add_adapter("late", DyLoraConfig(r=2, target_modules=targets))
    assert not lora.model.has_lora(model)  # the plain one is active
    model.set_adapter("late")
    for use in (
        lora.model.has_lora,
        lambda m: lora.set_rank(m, 1),
        lambda m: lora.set_rank(torch.nn.ModuleList([m]), 1),
    ):
        with pytest.raises(ValueError, match="add the DyLoraConfig's adapter to the model first"):
            use(model)


def test_names_that_mean_something_else_elsewhere_are_left_alone():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self._base, self.inner = torch.nn.Linear(4, 2), "a name", torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)

    model = get_peft_model(Own(), DyLoraConfig(r=2, target_modules=["inner"]))
    lora.set_rank(model, 1)
    lora.inject(Own(), ["inner"], r=2)


def test_scale_layer_scales_every_rank():
    model = within("llama", target_modules=["q_proj"])
    doubled = within("llama", target_modules=["q_proj"], lora_alpha=16)
    for module in model.modules():
        if isinstance(module, stock.LoraLayer):
            module.scale_layer(2.0)
    for rank in (1, 4, torch.tensor([1, 2, 4])):
        torch.testing.assert_close(out(model, rank), out(doubled, rank), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_dora": True}, "use_dora = True: such an adapter has no ranks to choose"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "give bias='none'"),
        ({"rank_scaling": "alpha"}, "alpha/b"),
    ],
)
def test_what_has_no_ranks_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DyLoraConfig(r=4, target_modules=["q_proj"], **options)


def test_a_convolution_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="Conv2d cannot have ranks inside PEFT"):
        get_peft_model(model, DyLoraConfig(r=2, target_modules=["0"]))


# --- what is used of PEFT's private parts ---------------------------------------------------------------


def test_the_installed_peft_has_what_is_used():
    signatures = {
        "init": ["module", "adapter_name"],
        "forward": ["module", "active_adapter", "x", "result", "kwargs"],
        "merge_safe": ["module", "active_adapter", "orig_weight"],
        "merge_unsafe": ["module", "active_adapter", "orig_weight"],
        "unmerge": ["module", "active_adapter", "orig_weight"],
    }
    for name, wanted in signatures.items():
        assert list(inspect.signature(getattr(stock.LoraVariant, name)).parameters) == wanted, name
    assert list(inspect.signature(stock.LoraLayer.resolve_lora_variant).parameters) == ["self", "config", "kwargs"]
    assert list(inspect.signature(stock.LoraLayer._cast_input_dtype).parameters) == ["self", "x", "dtype"]
    assert hasattr(LoraConfig, "_register_custom_module")
    for kind in layer_classes().values():
        if isinstance(kind, type):
            assert issubclass(kind, stock.LoraLayer) and hasattr(kind, "resolve_lora_variant")


@pytest.mark.parametrize(("options", "scaling"), [({}, "alpha/r"), ({"rank_scaling": "alpha/b"}, "alpha/b")])
def test_what_pefts_own_saving_writes_keeps_the_rule_of_strength(options, scaling, tmp_path):
    model = within(target_modules=["q_proj", "v_proj"], **options)
    model.save_pretrained(tmp_path)
    assert DyLoraConfig.from_pretrained(tmp_path).rule() == scaling
    other = build()
    lora.load_adapter(other, tmp_path)
    for rank in (1, 2, 4):
        torch.testing.assert_close(out(other, rank), out(model, rank), atol=1e-6, rtol=1e-5)


def test_two_adapters_with_ranks_are_not_active_together():
    model = within()
    model.add_adapter("other", DyLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="The adapters default, other are active together; set one with set_adapter"):
        lora.set_rank(model, 0)
    model.set_adapter("other")
    lora.set_rank(model, 2)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_merging_into_one_of_two_tied_weights_changes_that_one_alone(targets):
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    )
    options = DyLoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = strong(get_peft_model(base, options)).eval()
    merged = lora.merge(model, 2)
    torch.testing.assert_close(merged(input_ids=IDS).logits, out(model, 2), atol=1e-5, rtol=1e-5)
    assert not merged.config.tie_word_embeddings


def test_dropout_leaves_the_indices_of_an_embedding_alone():
    model = within(target_modules=["embed_tokens"], lora_dropout=0.5).train()
    lora.set_rank(model, torch.tensor([1, 4]))
    assert torch.isfinite(model(input_ids=IDS[:2]).logits).all()


def test_a_mixed_batch_with_a_rank_for_each_example_says_what_is_wrong():
    model = within()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS["llama"]))
    lora.set_rank(model, torch.tensor([1, 2, 3]))
    with pytest.raises(Exception) as caught:
        model(input_ids=IDS, adapter_names=["default", "other", "default"])
    assert not isinstance(caught.value, KeyError)


def test_what_add_adapter_of_transformers_put_in_has_ranks_and_is_saved_but_not_merged(tmp_path):
    model = build()
    model.add_adapter(DyLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    strong(model)
    lora.save_adapter(model, tmp_path, rank=2)
    torch.testing.assert_close(out(PeftModel.from_pretrained(build(), tmp_path).eval()), out(model, 2))
    with pytest.raises(ValueError, match="put in by add_adapter, and cannot be merged so; make the model with"):
        lora.merge(model, 2)
    with pytest.raises(ValueError, match="put in by add_adapter, and cannot be loaded into so; make the model with"):
        lora.load_adapter(model, tmp_path)
