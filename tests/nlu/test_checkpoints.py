"""Models and tokenizers that are not what they say: one sentence each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, RobertaConfig
from transformers_dylora.arguments import ModelArguments
from transformers_dylora.errors import UsageError
from transformers_dylora.modeling import load_model, load_tokenizer, longest_input
from transformers_dylora.tasks import TASKS


@pytest.fixture
def copy(roberta_checkpoint, tmp_path):
    return shutil.copytree(roberta_checkpoint, tmp_path / "model")


def arguments(directory, **more):
    return ModelArguments(str(directory), apply_lora=True, lora_r=2, **more)


def cut_off(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def configured(**changes):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def other_shape(directory):
    tensors = load_file(directory / "model.safetensors")
    key = next(key for key in tensors if key.endswith("query.weight"))
    tensors[key] = torch.zeros(3, 3)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


WRONG = {
    "truncated weights": (cut_off, "is no whole checkpoint"),
    "no configuration": (lambda d: (d / "config.json").unlink(), "model"),
    "a configuration that is no JSON": (lambda d: (d / "config.json").write_text("{"), "model"),
    "no model type": (lambda d: (d / "config.json").write_text("{}"), "is no whole checkpoint"),
    "fewer layers than weights": (configured(num_hidden_layers=1), r"layer\.1.*has no layer; mend one of them"),
    "more layers than weights": (configured(num_hidden_layers=3), r"lacks .*layer\.2"),
    "weights of another shape": (other_shape, "in another shape than its configuration says"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_is_not_what_it_says(what, copy, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change, message = WRONG[what]
    change(copy)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(arguments(copy), TASKS["rte"], training=True)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


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
