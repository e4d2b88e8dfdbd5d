"""RoBERTa whose query and value projections are DyLoRA layers, for sequence classification.

The classes derive from the installed transformers' own, down to the self-attention, and change one thing there: with
``config.apply_lora`` the query and value are ``loralib.Linear``. The configuration keys are those of the released code:

    apply_lora (False), lora_r (8), lora_alpha (16); beside them lora_dropout (0.0) and lora_scaling ("alpha/b").

Any RoBERTa checkpoint loads: ``RobertaForSequenceClassification.from_pretrained(path, config=config)``. At rank 0 the
logits are the stock model's.
"""

import contextlib
import functools

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.roberta import modeling_roberta as stock

import loralib as lora


class RobertaSelfAttention(stock.RobertaSelfAttention):
    def __init__(self, config, is_causal=False, layer_idx=None):
        super().__init__(config, is_causal=is_causal, layer_idx=layer_idx)
        if getattr(config, "apply_lora", False):
            for name in ("query", "value"):
                projection = lora.Linear(
                    config.hidden_size,
                    self.all_head_size,
                    r=getattr(config, "lora_r", 8),
                    lora_alpha=getattr(config, "lora_alpha", 16),
                    lora_dropout=getattr(config, "lora_dropout", 0.0),
                    scaling=getattr(config, "lora_scaling", "alpha/b"),
                )
                setattr(self, name, projection)

    def attend_from_first(self, hidden_states, attention_mask=None):
        """The attention's output for the first token alone: (batch, 1, width), from all tokens' keys and values."""
        heads = (self.num_attention_heads, self.attention_head_size)
        query = self.query(hidden_states[:, :1]).unflatten(-1, heads).transpose(1, 2)
        key, value = (project(hidden_states).unflatten(-1, heads).transpose(1, 2) for project in (self.key, self.value))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, stock.eager_attention_forward
        )
        context, _ = attention(
            self,
            query,
            key,
            value,
            None if attention_mask is None else attention_mask[:, :, :1],
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
        )
        return context.flatten(2)


class RobertaAttention(stock.RobertaAttention):
    def __init__(self, config, is_causal=False, layer_idx=None, is_cross_attention=False):
        super().__init__(config, is_causal=is_causal, layer_idx=layer_idx, is_cross_attention=is_cross_attention)
        if not is_cross_attention:
            self.self = RobertaSelfAttention(config, is_causal=is_causal, layer_idx=layer_idx)


class RobertaLayer(stock.RobertaLayer):
    first_token_only = False  # set on the last layer by RobertaModel, for the call that it makes

    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        self.attention = RobertaAttention(config, is_causal=config.is_decoder, layer_idx=layer_idx)

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        if not self.first_token_only:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        context = self.attention.self.attend_from_first(hidden_states, attention_mask)
        return self.feed_forward_chunk(self.attention.output(context, hidden_states[:, :1]))


class RobertaEncoder(stock.RobertaEncoder):
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.ModuleList(RobertaLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))


class RobertaPreTrainedModel(stock.RobertaPreTrainedModel):
    def _init_weights(self, module):
        # from_pretrained builds on the meta device and calls this for what the checkpoint lacks; it leaves alone
        # whatever was loaded. The base weight of an adapted layer is initialised as any Linear's.
        super()._init_weights(module)
        if isinstance(module, lora.LoRALayer) and module.r:
            module.reset_adapter()


class RobertaModel(RobertaPreTrainedModel, stock.RobertaModel):
    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.encoder = RobertaEncoder(config)
        self.post_init()

    def forward(self, *args, first_token_only=False, **kwargs):
        # It stays set until the next call: a checkpointed layer that is computed again computes the same.
        self.encoder.layer[-1].first_token_only = first_token_only
        return super().forward(*args, **kwargs)


class RobertaForSequenceClassification(RobertaPreTrainedModel, stock.RobertaForSequenceClassification):
    """Sequence classification with adapted query and value; ranks are 1-based, 0 is the base model."""

    reads_first_token = False  # within first_token_only

    def __init__(self, config):
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.post_init()

    def set_rank(self, rank, frozen: bool = False) -> None:
        """``loralib.set_rank`` on this model."""
        lora.set_rank(self, rank, frozen)

    def get_rank(self):
        """``loralib.get_rank`` of this model."""
        return lora.get_rank(self)

    @contextlib.contextmanager
    def first_token_only(self):
        """Within the body the last layer computes the first token's row alone, in calls of which nothing else reads it.

        The same logits and gradients but for rounding, for less time. Without effect for another head than RoBERTa's
        own, where hidden states or attentions are asked for or hooks look at them, for a decoder and for attention
        kernels whose mask is not (batch, heads, from, to).
        """
        before, self.reads_first_token = self.reads_first_token, True
        try:
            yield
        finally:
            self.reads_first_token = before
            self.roberta.encoder.layer[-1].first_token_only = False

    @functools.wraps(stock.RobertaForSequenceClassification.forward)
    def forward(self, *args, **kwargs):
        return super().forward(*args, first_token_only=self.reads_first_token and self._needs_no_more(kwargs), **kwargs)

    def _needs_no_more(self, asked: dict) -> bool:
        """Whether of the last layer's output the first token is all that a call needs."""
        outputs = ("output_hidden_states", "output_attentions")
        more = any(getattr(self.config, name, False) if asked.get(name) is None else asked[name] for name in outputs)
        last = self.roberta.encoder.layer[-1]
        watched = any(m._forward_hooks for m in (self.roberta, self.roberta.encoder, last, last.attention, last.output))
        usual = not self.config.is_decoder and self.config._attn_implementation in ("sdpa", "eager")
        return usual and not more and not watched and type(self.classifier) is stock.RobertaClassificationHead

    def get_dimension(self) -> int:
        """r_max."""
        return lora.max_rank(self)
