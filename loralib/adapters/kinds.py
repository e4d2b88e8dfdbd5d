"""What a model is for, in the words of adapters' files: PEFT's task type, and a classifier's labels."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .keys import factor_in


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what the model's class does, or None if it has none.

    None, too, where PEFT's class for it would not call the model with its inputs: it hands over ``input_ids``, and
    Whisper takes features, Wav2Vec2 waves.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    names = " ".join(cls.__name__ for cls in type(model).__mro__)
    of_both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    kinds = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM" if of_both else "CAUSAL_LM",  # LLaVA is a decoder that sees
    }
    return next((kind for ending, kind in kinds.items() if ending in names), None)


def label_facts(model: nn.Module) -> dict:
    """How many labels a transformers classifier has, and their names."""
    config: Any = getattr(model, "config", None)
    if not re.search(r"For\w*Classification", type(model).__name__) or getattr(config, "id2label", None) is None:
        return {}
    return {"num_labels": config.num_labels, "labels": [str(config.id2label[i]) for i in range(config.num_labels)]}


def head_outputs(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """How many outputs the head in an adapter's file has: the rows of the narrowest matrix that was saved beside the
    factors (layers of a head before the last are as wide as the model); None without one."""
    heads = [len(value) for key, value in tensors.items() if not factor_in(key) and key.endswith("weight")]
    return min(heads, default=None)
