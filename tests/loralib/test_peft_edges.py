"""Where PEFT's adapters are other than most: stock PEFT's result, or one sentence."""

import json
import pickle
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import loralib as lora
from loralib.adapters.directory import cut_adapter
from loralib.peft import DyLoraConfig

from .helpers import IDS, logits_at

ON = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def base(**more):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=120)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, **more)).eval()


def classifier(names="abc"):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=120)
    labels = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **labels)).eval()


def strong(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lin = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.lin(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("rank", [4, 2])
def test_pefts_convolutions_are_cut_component_by_component(rank, tmp_path):
    model = strong(get_peft_model(Convolved(), LoraConfig(r=4, lora_alpha=4, target_modules=["conv", "lin"])))
    model.save_pretrained(tmp_path / "whole")
    cut_adapter(tmp_path / "whole", tmp_path / "cut", rank)
    x, wanted = torch.randn(2, 3, 6, 6), Convolved().eval()
    with torch.no_grad():
        for name, layer in (("conv", wanted.conv), ("lin", wanted.lin)):
            peer = model.base_model.model.get_submodule(name)
            A, B = peer.lora_A["default"].weight[:rank].flatten(1), peer.lora_B["default"].weight[:, :rank].flatten(1)
            layer.weight += (B @ A).view(layer.weight.shape)  # alpha is r: a strength of 1 at each rank
    torch.testing.assert_close(PeftModel.from_pretrained(Convolved(), tmp_path / "cut").eval()(x), wanted(x))
    with pytest.raises(ValueError, match=r"adapts the convolution 'conv' in PEFT's way"):
        lora.load_adapter(Convolved(), tmp_path / "whole")


@pytest.mark.parametrize("Config", [LoraConfig, DyLoraConfig])
def test_a_linear_layer_beside_a_conv1d_is_merged_as_it_is_stored(Config):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.l = Conv1D(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.l(self.c(x).tanh())

    torch.manual_seed(0)
    model, x = strong(get_peft_model(Net(), Config(r=4, target_modules=["c", "l"]))), torch.randn(3, 16)
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused_before_the_training(start):
    with pytest.raises(ValueError, match=f"init_lora_weights = '{start}' changes more than the adapter's start"):
        DyLoraConfig(init_lora_weights=start, **ON)


def test_an_old_configuration_lacks_fields(tmp_path):
    model = strong(get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, **ON)))
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "adapter_config.json"
    kept = ("base_model_name_or_path", "bias", "lora_alpha", "r", "peft_type", "target_modules", "task_type")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: config[name] for name in kept}))
    cut_adapter(tmp_path / "old", tmp_path / "cut", 4)
    torch.testing.assert_close(logits_at(PeftModel.from_pretrained(base(), tmp_path / "cut").eval()), logits_at(model))


def test_other_kinds_are_refused_by_their_kind_and_8_bit_factors_are_read(tmp_path):
    from peft import OFTConfig
    from safetensors.torch import load_file, save_file

    get_peft_model(base(), OFTConfig(oft_block_size=2, **ON)).save_pretrained(tmp_path / "oft")
    with pytest.raises(ValueError, match="is a 'OFT' adapter"):
        lora.load_adapter(base(), tmp_path / "oft")
    strong(get_peft_model(base(), LoraConfig(r=4, **ON))).save_pretrained(tmp_path / "fp8")
    file = tmp_path / "fp8" / "adapter_model.safetensors"
    rounded = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(file).items()}
    save_file(rounded, file)
    model = base()
    lora.load_adapter(model, tmp_path / "fp8")
    wanted = rounded["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_A, wanted)


def test_the_fast_path_of_torchs_encoder_is_left_inside_peft_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
            self.enc = nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.enc(x)

    torch.manual_seed(0)
    model, x = (
        strong(get_peft_model(Net(), DyLoraConfig(r=4, target_modules=["linear1", "linear2"]))),
        torch.randn(3, 5, 16),
    )
    lora.set_rank(model.train(), 3)
    trained = model(x)
    with torch.no_grad():
        lora.set_rank(model.eval(), 3)
        torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-4)


def test_a_batch_of_several_adapters_with_ranked_embeddings_is_refused():
    config = DyLoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = strong(get_peft_model(base(), config))
    with pytest.raises(ValueError, match="'default', whose embedding has ranks"):
        model(input_ids=IDS, adapter_names=["default", "__base__", "default"])


def test_a_rank_pattern_above_r_counts(tmp_path):
    model = strong(get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 8}, **ON)))
    model.save_pretrained(tmp_path / "whole")
    for rank in (3, 4, 5, 8):
        cut_adapter(tmp_path / "whole", tmp_path / f"{rank}", rank)
        other = base()
        lora.load_adapter(other, tmp_path / "whole", rank=rank)
        peer = PeftModel.from_pretrained(base(), tmp_path / f"{rank}").eval()
        torch.testing.assert_close(logits_at(peer), logits_at(other.eval()))
    torch.testing.assert_close(logits_at(peer), logits_at(model))


def test_it_pickles():
    model = strong(get_peft_model(base(), DyLoraConfig(r=4, **ON)))
    lora.set_rank(model, 2)
    torch.testing.assert_close(logits_at(pickle.loads(pickle.dumps(model))), logits_at(model))


def test_ranks_of_adapters_that_peft_put_into_a_model_of_transformers():
    model = inject_adapter_in_model(DyLoraConfig(r=4, target_modules=["q_proj"]), base())
    wanted = strong(get_peft_model(base(), DyLoraConfig(r=4, target_modules=["q_proj"])))
    torch.testing.assert_close(logits_at(strong(model), 2), logits_at(wanted, 2))
    torch.testing.assert_close(logits_at(wanted.get_base_model(), 3), logits_at(wanted, 3))


def test_modules_to_save_of_add_adapter_are_not_lost_without_a_word(tmp_path):
    model = base()
    model.add_adapter(DyLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head trains beside the adapter.*save with model.save_pretrained"):
        lora.save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("more", [{"lora_alpha": 8}, {"rank_scaling": "alpha/b"}, {"use_rslora": True}])
def test_another_strength_is_refused_inside_peft(more, tmp_path):
    lora.save_adapter(strong(get_peft_model(base(), DyLoraConfig(r=4, lora_alpha=16, **ON))), tmp_path)
    other = get_peft_model(base(), DyLoraConfig(**{"r": 4, "lora_alpha": 16, **more, **ON}))
    with pytest.raises(ValueError, match="was trained with"):
        lora.load_adapter(other, tmp_path)


def test_another_strength_of_any_layer_is_refused(tmp_path):
    strong(get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, alpha_pattern={"v_proj": 64}, **ON))).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="was trained with lora_alpha = 64, the model has 8"):
        lora.load_adapter(lora.inject(base(), ON["target_modules"], r=4, lora_alpha=8), tmp_path)


@pytest.mark.parametrize("names", ["cab", "xyz"])
def test_other_labels_are_refused_inside_peft(names, tmp_path):
    config = DyLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    lora.save_adapter(strong(get_peft_model(classifier("abc"), config)), tmp_path)
    with pytest.raises(ValueError, match=f"knows the labels a, b, c, the model {', '.join(names)}"):
        lora.load_adapter(get_peft_model(classifier(names), config), tmp_path)
    lora.load_adapter(get_peft_model(classifier("abc"), config), tmp_path)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_the_base_that_peft_stores_beside_an_embedding_is_passed_over(target, tmp_path):
    config = DyLoraConfig(r=4, target_modules=[target, "q_proj"], task_type="CAUSAL_LM")
    model = strong(get_peft_model(base(), config))
    model.save_pretrained(tmp_path)
    for other in (base(), get_peft_model(base(), config)):
        lora.load_adapter(other, tmp_path)
        torch.testing.assert_close(logits_at(other.eval(), 2), logits_at(model, 2))


def test_a_classifier_whose_head_stays_as_it_is(tmp_path):
    model = strong(lora.inject(classifier(), ["query"], r=4, modules_to_save=[]))
    lora.save_adapter(model, tmp_path)
    other, ids = classifier(), IDS
    lora.load_adapter(other, tmp_path)
    torch.testing.assert_close(other.eval()(ids).logits, model(ids).logits)
    torch.testing.assert_close(PeftModel.from_pretrained(classifier(), tmp_path).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["rules", "projections"])
def test_what_peft_has_no_place_for_is_refused(kind, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24))
    lora.inject(model, ["0"], r=4, scaling="alpha/b")
    if kind == "rules":
        lora.inject(model, ["1"], r=4, scaling="alpha/r")
    else:
        model[1] = lora.MergedLinear(8, 24, r=4, enable_lora=[True, False, True])
    lora.save_adapter(strong(model), tmp_path)
    with pytest.raises(ValueError, match="which PEFT has no place for: cut it to a rank"):
        DyLoraConfig.from_pretrained(str(tmp_path))


def test_peft_converts_at_the_rank_that_is_set():
    from peft import convert_to_lora, set_peft_model_state_dict

    model = strong(get_peft_model(base(), DyLoraConfig(r=4, lora_alpha=8, **ON)))
    wanted = logits_at(model, 2)
    lora.set_rank(model, 2)
    config, state = convert_to_lora(model, 4)
    peer = get_peft_model(base(), config).eval()
    set_peft_model_state_dict(peer, state)
    torch.testing.assert_close(logits_at(peer), wanted, rtol=1e-4, atol=1e-5)


def test_hot_swapping_to_a_higher_rank_is_refused(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    strong(get_peft_model(base(), DyLoraConfig(r=8, **ON))).save_pretrained(tmp_path)
    model = strong(get_peft_model(base(), DyLoraConfig(r=4, **ON)))
    hotswap_adapter(model, str(tmp_path), "default")
    with pytest.raises(RuntimeError, match="has 8 components, and was made with 4: PEFT's hot-swapping"):
        logits_at(model)


@pytest.mark.parametrize("inside", [False, True])
def test_new_tokens_whose_embeddings_no_adapter_holds_are_named(inside, tmp_path):
    base().save_pretrained(tmp_path / "base")

    def adapted(new: int, **more):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(120 + new)
        if inside:
            return get_peft_model(model, DyLoraConfig(r=4, **ON, **more))
        return lora.inject(model, ON["target_modules"], r=4, **more)

    with pytest.warns(UserWarning, match=r"have 123 tokens, those of .*base 120: .* before inject"):
        lora.save_adapter(adapted(3), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The embeddings have")
        lora.save_adapter(adapted(0), tmp_path / "b")
        lora.save_adapter(adapted(3, modules_to_save=["embed_tokens"]), tmp_path / "c")
