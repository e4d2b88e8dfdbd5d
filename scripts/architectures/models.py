"""Tiny models with random weights, one of each architecture, each with a batch for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf

TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROWS = 3  # examples of a batch


def tokens() -> dict:
    torch.manual_seed(3)
    ids = torch.randint(5, 60, (ROWS, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both_sides() -> dict:
    return tokens() | {"decoder_input_ids": tokens()["input_ids"][:, :5]}


def images() -> dict:
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(ROWS, 3, 32, 32)}


def speech() -> dict:
    torch.manual_seed(3)
    return {"input_values": torch.randn(ROWS, 800)}


def spectra() -> dict:
    torch.manual_seed(3)
    return {"input_features": torch.randn(ROWS, 8, 20), "decoder_input_ids": tokens()["input_ids"][:, :5]}


@dataclass(frozen=True)
class Architecture:
    """How to build one, and what it reads."""

    name: str
    kind: type  # one of transformers' Auto classes
    model_type: str
    options: dict
    batch: Callable[[], dict] = tokens
    own: bool = False  # the options are all of its sizes: the names of TINY are not its words

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = tf.AutoConfig.for_model(self.model_type, **(self.options if self.own else TINY | self.options))
        model = self.kind.from_config(config).eval()
        for parameter in model.parameters():  # no two examples alike, and no dead unit
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        return model

    @property
    def generates(self) -> bool:
        return self.kind in (CAUSAL, SEQ2SEQ, SPEECH)


CLASSES, CAUSAL, SEQ2SEQ = (
    tf.AutoModelForSequenceClassification, tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM,
)  # fmt: skip
IMAGES, FEATURES, SPEECH = tf.AutoModelForImageClassification, tf.AutoModel, tf.AutoModelForSpeechSeq2Seq
GROUPED = dict(num_key_value_heads=2)
BART = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=0,
    eos_token_id=2, decoder_start_token_id=0,
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32)

ARCHITECTURES = [
    Architecture("BERT", CLASSES, "bert", {}),
    Architecture("RoBERTa", CLASSES, "roberta", {}),
    Architecture("XLM-RoBERTa", CLASSES, "xlm-roberta", {}),
    Architecture("CamemBERT", CLASSES, "camembert", {}),
    Architecture(
        "DistilBERT", CLASSES, "distilbert",
        dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64), own=True,
    ),
    Architecture("ALBERT", CLASSES, "albert", dict(embedding_size=16)),
    Architecture("ELECTRA", CLASSES, "electra", dict(embedding_size=16)),
    Architecture("MPNet", CLASSES, "mpnet", {}),
    Architecture("DeBERTa", CLASSES, "deberta", dict(relative_attention=True, pos_att_type=["c2p", "p2c"])),
    Architecture("DeBERTa-v2", CLASSES, "deberta-v2", dict(relative_attention=True, pos_att_type=["c2p", "p2c"])),
    Architecture(
        "DeBERTa-v3", CLASSES, "deberta-v2",
        dict(relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_biased_input=False),
    ),
    Architecture("ModernBERT", CLASSES, "modernbert", dict(global_attn_every_n_layers=2, cls_token_id=1)),
    Architecture(
        "XLNet", CLASSES, "xlnet", dict(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48), own=True
    ),
    Architecture("BERT, pooled by the mean", FEATURES, "bert", {}),
    Architecture(
        "GPT-2", CAUSAL, "gpt2",
        dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=2), own=True,
    ),
    Architecture("GPT-NeoX", CAUSAL, "gpt_neox", {}),
    Architecture(
        "GPT-J", CAUSAL, "gptj",
        dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, pad_token_id=0,
             eos_token_id=2), own=True,
    ),
    Architecture("OPT", CAUSAL, "opt", dict(ffn_dim=48, word_embed_proj_dim=32)),
    Architecture("BLOOM", CAUSAL, "bloom", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), own=True),
    Architecture("Falcon", CAUSAL, "falcon", {}),
    Architecture("Llama", CAUSAL, "llama", GROUPED),
    Architecture("Mistral", CAUSAL, "mistral", GROUPED),
    Architecture("Mixtral", CAUSAL, "mixtral", GROUPED | dict(num_local_experts=4)),
    Architecture("Qwen2", CAUSAL, "qwen2", GROUPED),
    Architecture("Qwen3", CAUSAL, "qwen3", GROUPED | dict(head_dim=8)),
    Architecture("Gemma 2", CAUSAL, "gemma2", GROUPED | dict(head_dim=8)),
    Architecture("Gemma 3, text", CAUSAL, "gemma3_text", GROUPED | dict(head_dim=8)),
    Architecture("Phi", CAUSAL, "phi", {}),
    Architecture("Phi-3", CAUSAL, "phi3", GROUPED),
    Architecture("OLMo 2", CAUSAL, "olmo2", GROUPED),
    Architecture("StableLM", CAUSAL, "stablelm", GROUPED),
    Architecture("Granite", CAUSAL, "granite", GROUPED),
    Architecture("SmolLM3", CAUSAL, "smollm3", GROUPED),
    Architecture("T5", SEQ2SEQ, "t5", T5, both_sides, own=True),
    Architecture("BART", SEQ2SEQ, "bart", BART, both_sides, own=True),
    Architecture("Pegasus", SEQ2SEQ, "pegasus", BART, both_sides, own=True),
    Architecture(
        "Whisper", SPEECH, "whisper",
        BART | dict(num_mel_bins=8, max_source_positions=10, max_target_positions=64, suppress_tokens=None,
                    begin_suppress_tokens=None), spectra, own=True,
    ),
    Architecture("ViT", IMAGES, "vit", VISION | dict(patch_size=8), images, own=True),
    Architecture("DINOv2", IMAGES, "dinov2", VISION | dict(patch_size=8), images, own=True),
    Architecture(
        "Swin", IMAGES, "swin", dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                                     window_size=4), images, own=True,
    ),
    Architecture(
        "ConvNeXt", IMAGES, "convnext", dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32,
             layer_scale_init_value=1.0), images, own=True,
    ),
    Architecture(
        "Wav2Vec2", tf.AutoModelForAudioClassification, "wav2vec2",
        dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, classifier_proj_size=8,
             mask_time_prob=0.0, mask_feature_prob=0.0),
        speech, own=True,
    ),
]  # fmt: skip
