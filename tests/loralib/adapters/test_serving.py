"""What an exported adapter becomes in vLLM, by what its files say."""

import json

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import loralib as lora
from loralib.adapters.serving import check_for_vllm
from loralib.cli import main
from loralib.model import lora_layers


def saved(checkpoint, directory, auto=AutoModelForCausalLM, targets=("q_proj", "v_proj"), **options):
    model = lora.inject(auto.from_pretrained(checkpoint), list(targets), **({"r": 8} | options))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    lora.save_adapter(model, directory)


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/b", "alpha/sqrt(b)"])
def test_what_vllm_reads_is_the_strength(scaling, llama_checkpoint, tmp_path, capsys):
    """vLLM computes lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, from adapter_config.json alone."""
    saved(llama_checkpoint, tmp_path / "a", scaling=scaling)
    assert main(["export", str(tmp_path / "a"), "--rank", "4", "--to", str(tmp_path / "b"), "--for", "vllm"]) == 0
    assert "--max-lora-rank 8" in capsys.readouterr().out
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    strength = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    assert config["r"] == 4 and not config["modules_to_save"] and not config["rank_pattern"]
    assert strength == pytest.approx({"alpha/r": 2, "alpha/b": 4, "alpha/sqrt(b)": 8}[scaling])


def test_what_would_be_served_wrong_is_refused_and_nothing_written(
    llama_checkpoint, roberta_checkpoint, tmp_path, capsys
):
    saved(llama_checkpoint, tmp_path / "ranks", rank_pattern={"q_proj": 2})
    saved(llama_checkpoint, tmp_path / "alphas", alpha_pattern={"q_proj": 2})
    saved(roberta_checkpoint, tmp_path / "head", AutoModelForSequenceClassification, ("query",))
    for name, sentence in (("ranks", "one rank for all"), ("alphas", "one alpha"), ("head", "modules of their own")):
        command = ["export", str(tmp_path / name), "--rank", "4", "--to", str(tmp_path / "out"), "--for", "vllm"]
        assert main(command) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
    # at rank 2 all layers have rank 2 and one strength: nothing is in the way any more
    assert main(["export", str(tmp_path / "ranks"), "--rank", "2", "--to", str(tmp_path / "out"), "--for", "vllm"]) == 0


def test_ranks_are_padded_to_the_next_that_vllm_knows():
    for r, wanted in ((1, 8), (8, 8), (9, 16), (200, 256), (512, 512)):
        assert check_for_vllm({"r": r}, "a") == wanted
    with pytest.raises(ValueError, match="at most 512"):
        check_for_vllm({"r": 513}, "a")
