"""Tiny models of many kinds, each with a batch for them: what one rank per example must run right on, or refuse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn

TINY = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=50)


def ids(n: int, s: int) -> dict:
    return {"input_ids": torch.randint(5, 50, (n, s)), "attention_mask": torch.ones(n, s, dtype=torch.long)}


def pixels(n: int, s: int) -> dict:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


def frames(n: int, s: int) -> dict:
    return {"src": torch.randn(s, n, 16)}


def features(n: int, s: int) -> dict:
    return {"src": torch.randn(n, s, 16)}


def choices(n: int, s: int) -> dict:
    return {"input_ids": torch.randint(5, 50, (n, 3, s)), "attention_mask": torch.ones(n, 3, s, dtype=torch.long)}


class FirstIsSequence(nn.Module):
    """Tokens of a sequence-first batch, flattened: rows stand tiled."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.batch_first, self.inner, self.mix = batch_first, nn.Linear(16, 16), nn.GRU(16, 16, batch_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, src):
        x, _ = self.mix(src)
        x = x + self.inner(x.reshape(-1, 16)).view(x.shape)
        return self.head(x.mean(1 if self.batch_first else 0))


class Mixture(nn.Module):
    """A mixture of experts on flattened tokens, each routed to one of two experts; with an expert that all tokens share."""

    def __init__(self, top: int = 1):
        super().__init__()
        self.embed, self.router = nn.Embedding(50, 16), nn.Linear(16, 2, bias=False)
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.shared_expert, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        flat = x.reshape(-1, 16)
        chosen = self.router(flat).argmax(-1)
        out = self.shared_expert(flat)
        for e, expert in enumerate(self.experts):
            rows = (chosen == e).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]))
        return self.head((flat + out).view(x.shape).mean(1))


class BestTokens(nn.Module):
    """Experts that choose their tokens among the whole batch: always equally many, and whose changes."""

    def __init__(self):
        super().__init__()
        self.embed, self.router, self.expert = nn.Embedding(50, 16), nn.Linear(16, 1), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        flat = x.reshape(-1, 16)
        rows = self.router(flat)[:, 0].topk(len(input_ids)).indices
        return flat.index_add(0, rows, self.expert(flat[rows])).view(x.shape).mean(1)


@dataclass(frozen=True)
class Animal:
    """A model, a batch for it, the layers to adapt, and whether it must run right (else it may be refused)."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], dict]
    targets: list[str] | str
    served: bool = True


def transformer(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def of(kind, config, **more):
    return lambda: kind(config(**{**TINY, **more}))


POSITIONS = dict(max_position_embeddings=64)


def deberta(**more):
    options = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], **POSITIONS)
    return of(tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, **options, **more)


ZOO = [
    Animal("RoBERTa", of(tf.RobertaForSequenceClassification, tf.RobertaConfig, **POSITIONS), ids, ["query", "value"]),
    Animal(
        "BERT", of(tf.BertForSequenceClassification, tf.BertConfig), ids, ["word_embeddings", "position_embeddings"]
    ),
    Animal("BERT, choices", of(tf.BertForMultipleChoice, tf.BertConfig), choices, ["query", "word_embeddings"]),
    Animal("BERT, tokens", of(tf.BertForTokenClassification, tf.BertConfig), ids, ["key", "intermediate.dense"]),
    Animal(
        "XLNet",
        lambda: tf.XLNetForSequenceClassification(
            tf.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=24)
        ),
        ids,
        ["layer_1", "layer_2"],
    ),
    Animal(
        "GPT-2",
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
        ids,
        ["c_attn", "wte", "wpe"],
    ),
    Animal("Llama", of(tf.LlamaForCausalLM, tf.LlamaConfig, num_key_value_heads=2), ids, ["q_proj", "down_proj"]),
    Animal(
        "OPT",
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=50,
                hidden_size=16,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
            )
        ),
        ids,
        ["fc1", "fc2", "q_proj"],
    ),
    Animal("DeBERTa-v2", deberta(), ids, ["query_proj", "value_proj"]),
    Animal("DeBERTa-v2, values", deberta(), ids, ["value_proj", "intermediate.dense"]),
    Animal(
        "DeBERTa-v3, shared",
        deberta(share_att_key=True, position_buckets=16),
        ids,
        ["query_proj", "key_proj"],
        served=False,
    ),
    Animal(
        "Longformer",
        of(
            tf.LongformerForSequenceClassification, tf.LongformerConfig, attention_window=4, pad_token_id=1, **POSITIONS
        ),
        ids,
        ["query", "value"],
    ),
    Animal(
        "ViT",
        of(tf.ViTForImageClassification, tf.ViTConfig, image_size=32, patch_size=8),
        pixels,
        ["q_proj", "projection"],
    ),
    Animal(
        "Swin",
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
        ),
        pixels,
        ["q_proj", "fc1", "reduction"],
    ),
    Animal(
        "T5",
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        lambda n, s: ids(n, s) | {"decoder_input_ids": torch.randint(5, 50, (n, s + 1))},
        ["q", "wo"],
    ),
    Animal("sequence first", lambda: transformer(False), frames, ["linear1", "linear2"]),
    Animal("batch first", lambda: transformer(True), features, ["linear1", "linear2"]),
    Animal("flattened", lambda: FirstIsSequence(True), features, ["inner", "head"]),
    Animal("flattened, sequence first", lambda: FirstIsSequence(False), frames, ["inner", "head"]),
    Animal("shared expert", Mixture, ids, ["shared_expert", "router", "head"]),
    Animal("experts", Mixture, ids, ["0", "1"], served=False),
    Animal("best tokens", BestTokens, ids, ["expert"], served=False),
]
