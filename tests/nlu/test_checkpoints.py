"""Models and tokenizers that are not what they say: one sentence each."""

import shutil

import pytest
from transformers import AutoTokenizer, RobertaConfig
from transformers_dylora.arguments import ModelArguments
from transformers_dylora.errors import UsageError
from transformers_dylora.modeling import load_tokenizer, longest_input


@pytest.fixture
def copy(roberta_checkpoint, tmp_path):
    return shutil.copytree(roberta_checkpoint, tmp_path / "model")


def arguments(directory, **more):
    return ModelArguments(str(directory), apply_lora=True, lora_r=2, **more)


def test_a_directory_without_a_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="holds no tokenizer; give one with --tokenizer_name"):
        load_tokenizer(arguments(copy))


def test_a_tokenizer_without_a_padding_token_gets_its_end_token(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.pad_token = None
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(arguments(copy)).pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copy)
    with pytest.raises(UsageError, match="neither a padding nor an end token"):
        load_tokenizer(arguments(copy))


@pytest.mark.parametrize(("pair", "shortest"), [(False, 3), (True, 4)])
def test_a_length_that_leaves_no_room_is_refused_and_positions_limit_it(pair, shortest, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    for length in range(1, shortest):
        with pytest.raises(UsageError, match=f"leave no room for text; give {shortest} or more"):
            longest_input(arguments(copy), tokenizer, pair, length)
    assert longest_input(arguments(copy), tokenizer, pair, shortest) == shortest
    assert longest_input(arguments(copy), tokenizer, pair, 512) == 64
    tokenizer.model_max_length = 10**30  # a tokenizer that names no maximum
    assert (
        longest_input(arguments(copy), tokenizer, pair, 512)
        == RobertaConfig.from_pretrained(copy).max_position_embeddings - 1
    )
