"""A merged model is a plain one: on disk, in training, and wherever it is merged."""

import pytest
import torch
import transformers
from torch import nn

import loralib as lora
from loralib.layers import adapted_layers

IDS = torch.arange(3, 15).reshape(2, 6)
SMALL = dict(vocab_size=50, max_position_embeddings=64)
ENCODER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BART = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
TIED = {
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig, BART, ["embed_tokens"]),
    "bart's encoder": (transformers.BartForConditionalGeneration, transformers.BartConfig, BART, ["encoder.embed_tokens"]),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, ENCODER, ["word_embeddings"]),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, ENCODER, ["word_embeddings"]),
    "roberta's output": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, ENCODER, ["lm_head.decoder"]),
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_are_all_on_disk(kind, tmp_path):
    torch.manual_seed(0)
    cls, config, sizes, targets = TIED[kind]
    model = cls(config(**SMALL, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    lora.inject(model, targets, r=2)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    inputs = {"decoder_input_ids": IDS} if kind.startswith("bart") else {}
    with torch.no_grad():
        wanted = model(IDS, **inputs).logits
        lora.merge(model, 2).save_pretrained(tmp_path)
        torch.testing.assert_close(cls.from_pretrained(tmp_path).eval()(IDS, **inputs).logits, wanted)


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_computed_blocks_again_trains_after_a_merge(again):
    model = lora.inject(llama(), ["q_proj", "v_proj"], r=4)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": lora.checkpoint_contexts(model)})
    plain = lora.merge(model.train(), 2).train().requires_grad_(True)
    if again:
        lora.inject(plain, ["q_proj", "v_proj"], r=4)
        lora.set_rank(plain, 2)
    plain(IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in plain.parameters())


def test_a_merge_in_place_within_use_rank_is_a_merge():
    model = lora.inject(llama(), ["q_proj"], r=4).eval()
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    with torch.no_grad(), lora.use_rank(model, 2):
        wanted = model(IDS).logits
        plain = lora.merge(model, inplace=True)
    assert not adapted_layers(plain)
    torch.testing.assert_close(plain(IDS).logits, wanted)
