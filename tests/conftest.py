"""Shared fixtures. Nothing here needs a network or the real GLUE data."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def microsoft():
    """microsoft/LoRA's loralib 0.1.2 under another name; scripts/test.sh installs it beside."""
    from scripts.benchmark.peers import microsoft_module

    module = microsoft_module()
    if module is None:
        pytest.skip("microsoft's loralib is not in the environment's peers folder; scripts/test.sh puts it there")
    return module


@pytest.fixture(scope="session")
def roberta_config():
    """A RoBERTa of a few thousand parameters."""
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def roberta_checkpoint(roberta_config, tmp_path_factory):
    """A directory with that model (an encoder with random weights, as hub checkpoints have) and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaModel

    directory = tmp_path_factory.mktemp("tiny-roberta")
    torch.manual_seed(0)
    RobertaModel(roberta_config, add_pooling_layer=False).save_pretrained(directory)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(100))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        model_max_length=64, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(directory)  # fmt: skip
    return directory
