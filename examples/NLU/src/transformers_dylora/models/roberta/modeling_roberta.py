"""RoBERTa whose query and value projections are DyLoRA layers, for sequence classification.

The classes derive from the installed transformers' own, down to the self-attention, and change one thing there: with
``config.apply_lora`` the query and value are ``loralib.Linear``. The configuration keys are those of the released code:

    apply_lora (False), lora_r (8), lora_alpha (16); beside them lora_dropout (0.0) and lora_scaling ("alpha/b").

Any RoBERTa checkpoint loads: ``RobertaForSequenceClassification.from_pretrained(path, config=config)``. At rank 0 the
logits are the stock model's.
"""

from torch import nn
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


class RobertaAttention(stock.RobertaAttention):
    def __init__(self, config, is_causal=False, layer_idx=None, is_cross_attention=False):
        super().__init__(config, is_causal=is_causal, layer_idx=layer_idx, is_cross_attention=is_cross_attention)
        if not is_cross_attention:
            self.self = RobertaSelfAttention(config, is_causal=is_causal, layer_idx=layer_idx)


class RobertaLayer(stock.RobertaLayer):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        self.attention = RobertaAttention(config, is_causal=config.is_decoder, layer_idx=layer_idx)


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


class RobertaForSequenceClassification(RobertaPreTrainedModel, stock.RobertaForSequenceClassification):
    """Sequence classification with adapted query and value; ranks are 1-based, 0 is the base model."""

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

    def get_dimension(self) -> int:
        """r_max."""
        return lora.max_rank(self)
