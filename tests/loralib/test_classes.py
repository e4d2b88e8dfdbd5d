"""Classes beside plain text models: what PEFT can load of them, compiled ones, and beams."""

import warnings

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

import loralib as lora
from loralib.adapters.kinds import task_type
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig

SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)


def whisper():
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, num_mel_bins=8,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=12,
            max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def wav2vec2():
    return tf.Wav2Vec2ForSequenceClassification(
        tf.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
            conv_stride=(4, 4), conv_kernel=(4, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=8,
        )
    )  # fmt: skip


def llava():
    text = tf.LlamaConfig(**SMALL, num_key_value_heads=2)
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)
    )


def bart():
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    )  # fmt: skip


def t5():
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=1,
        )
    )  # fmt: skip


KINDS = {
    "whisper": (whisper, None, lambda: {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": torch.ones(2, 3).long()}),
    "wav2vec2": (wav2vec2, None, lambda: {"input_values": torch.randn(2, 400)}),
    "llava": (llava, "CAUSAL_LM", lambda: {
        "input_ids": torch.tensor([[59] * 4 + [5, 6], [59] * 4 + [7, 8]]), "pixel_values": torch.randn(2, 3, 16, 16)}),
    "bart": (bart, "SEQ_2_SEQ_LM", lambda: {"input_ids": torch.randint(3, 60, (2, 5)), "decoder_input_ids": torch.ones(2, 3).long()}),
}  # fmt: skip


def strong(model):
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_what_is_saved(kind, tmp_path):
    make, wanted, inputs = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    stock = make()
    assert task_type(model) == wanted
    strong(lora.inject(model, ["q_proj", "v_proj"], r=4))
    lora.save_adapter(model, tmp_path / "a", rank=2)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "a").eval()
    batch = inputs()
    with torch.no_grad(), lora.use_rank(model, 2):
        torch.testing.assert_close(adapted(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-4)


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, eos_token_id=None))


@pytest.mark.parametrize("part", ["whole", "layers"])
def test_a_compiled_model_is_saved_and_loaded_by_clean_names(part, tmp_path):
    model = strong(lora.inject(llama(), ["q_proj", "v_proj"], r=4))
    lora.save_adapter(model, tmp_path / "plain")
    if part == "layers":
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(layer, backend="eager")
    compiled = torch.compile(model, backend="eager") if part == "whole" else model
    lora.save_adapter(compiled, tmp_path / "compiled")
    for file in ("adapter_config.json", "adapter_model.safetensors", "dylora.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "compiled" / file).read_bytes()
    for _, layer in lora_layers(model):
        nn.init.zeros_(layer.lora_B)
    lora.load_adapter(compiled, tmp_path / "plain")
    assert all(layer.lora_B.abs().sum() > 0 for _, layer in lora_layers(model))


def test_a_tensor_of_one_rank_compiles_into_one_graph_for_all():
    """What the documentation says to use in place of an int."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = strong(lora.inject(llama(), ["q_proj", "v_proj"], r=4))
    ids = torch.arange(12).reshape(2, 6)
    lora.learn_layout(model, input_ids=ids)
    compiled = torch.compile(model, backend=count)
    for rank in (1, 2, 3, 4):
        lora.set_rank(model, torch.full((2,), rank))
        with torch.no_grad():
            found = compiled(input_ids=ids).logits
        with torch.no_grad(), lora.use_rank(model, rank):
            torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)
        if rank == 1:
            first = len(graphs)
    assert len(graphs) == first


@pytest.mark.parametrize("beams", [1, 3])
def test_one_rank_per_sequence_generates_what_the_merged_models_do(beams):
    model = strong(lora.inject(llama(), ["q_proj", "v_proj", "down_proj"], r=4))
    ids, ranks = torch.arange(4, 16).reshape(3, 4), torch.tensor([1, 4, 2])
    settings = dict(max_new_tokens=6, num_beams=beams, do_sample=False, attention_mask=torch.ones(1, 4).long())
    lora.set_rank(model, ranks.repeat_interleave(beams))
    found = model.generate(ids, **settings | {"attention_mask": torch.ones_like(ids)})
    for row, rank in enumerate(ranks.tolist()):
        alone = lora.merge(model, rank=rank).generate(ids[row : row + 1], **settings)
        assert found[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", ["llama", "bart", "t5"])
@pytest.mark.parametrize("door", ["inject", "peft"])
def test_the_first_call_may_be_generate_which_calls_parts_of_a_model(kind, door):
    """PEFT's ``generate`` calls the model within its own, an encoder-decoder model's the encoder by itself."""
    torch.manual_seed(0)
    model = {"llama": llama, "bart": bart, "t5": t5}[kind]().eval()
    targets = ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]
    if door == "peft":
        task = "CAUSAL_LM" if kind == "llama" else "SEQ_2_SEQ_LM"
        model = get_peft_model(model, DyLoraConfig(r=4, target_modules=targets, task_type=task)).eval()
    else:
        lora.inject(model, targets, r=4)
    strong(model)
    ids, ranks = torch.arange(4, 16).reshape(3, 4), torch.tensor([1, 4, 2])
    settings = dict(max_new_tokens=6, do_sample=False)
    merged = {rank: lora.merge(model, rank=rank) for rank in (1, 2, 4)}
    lora.set_rank(model, ranks)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*adapted, and not called")
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    for row, rank in enumerate(ranks.tolist()):
        alone = merged[rank].generate(ids[row : row + 1], attention_mask=torch.ones(1, 4).long(), **settings)[0]
        assert found[row].tolist()[: len(alone)] == alone.tolist()
    assert not any(module._forward_hooks for module in merged[1].modules())


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_has_a_rank_per_sequence_and_its_decoder_one_per_beam(beams):
    torch.manual_seed(0)
    model = strong(lora.inject(bart(), ["q_proj", "v_proj", "fc1"], r=4))
    ids, ranks = torch.arange(4, 16).reshape(3, 4), torch.tensor([1, 4, 2])
    settings = dict(max_new_tokens=6, num_beams=beams, do_sample=False)
    lora.set_rank(model.get_encoder(), ranks)
    lora.set_rank(model.get_decoder(), ranks.repeat_interleave(beams))
    found = model.generate(ids, **settings)
    for row, rank in enumerate(ranks.tolist()):
        alone = lora.merge(model, rank=rank).generate(ids[row : row + 1], **settings)[0].tolist()
        assert found[row].tolist()[: len(alone)] == alone
