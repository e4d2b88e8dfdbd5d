"""examples/LM: the script from files to a table, a choice and an export, whose text in stock PEFT is ours."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import loralib as lora
from loralib.cli import main
from loralib.report.results import RankResults

from ..loralib.training.test_trl import language_model, rows, tokenizer

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "examples" / "LM" / "sft.py"


def sft():
    spec = importlib.util.spec_from_file_location("sft", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "more",
    [{}, {"peft": True, "fit_strengths": True}, {"bits": 8, "fit_strengths": True}],
    ids=["inject", "peft", "8 bits"],
)
def test_from_files_to_an_adapter_in_stock_peft(more, tmp_path, capsys):
    language_model(None).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for name, n in (("train", 40), ("validation", 12)):
        rows(n, n).to_json(tmp_path / f"{name}.jsonl")
    line = {
        "model": tmp_path / "base", "train": tmp_path / "train.jsonl", "validation": tmp_path / "validation.jsonl",
        "output_dir": tmp_path / "out", "lora_r": 8, "eval_ranks": "1,2,8", "targets": "q_proj,v_proj", "max_train_samples": 32,
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 12, "save_strategy": "steps", "save_steps": 6,
        "per_device_train_batch_size": 8, "learning_rate": 0.02, "max_length": 64, **more,
    }  # fmt: skip
    trainer, results = sft().main([part for name, value in line.items() for part in (f"--{name}", str(value))])
    if not more:  # from a checkpoint on it comes to the same, and without one it does not begin anew
        shutil.rmtree(tmp_path / "out" / "checkpoint-12")
        resumed = [part for name, value in line.items() for part in (f"--{name}", str(value))]
        resumed += ["--resume_from_checkpoint", "true"]
        again, _ = sft().main(resumed)
        for name, value in trainer.model.state_dict().items():
            torch.testing.assert_close(again.model.state_dict()[name], value)
        for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        with pytest.raises(ValueError, match="No valid checkpoint found"):
            sft().main(resumed)
    table = RankResults.read(tmp_path / "out")
    assert table == results and [row.rank for row in table.splits["validation"]] == [1, 2, 8] and table.metric == "loss"
    assert bool(table.fitted) == ("fit_strengths" in more)
    assert all(row.scores["perplexity"] > 1 for row in table.splits["validation"])
    assert main(["select", str(tmp_path / "out")]) == 0
    assert main(["export", str(tmp_path / "out"), "--rank", "2", "--to", str(tmp_path / "adapter")]) == 0
    assert "| rank | loss | perplexity |" in (tmp_path / "adapter" / "README.md").read_text()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2

    if "bits" in more:
        return  # the base of the peer would be another
    prompt = tokenizer()("w3 w4 w5 ", return_tensors="pt", return_token_type_ids=False)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    peer = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad(), lora.use_rank(trainer.model.eval(), 2):
        assert torch.equal(trainer.model.generate(**prompt, **options), peer.generate(**prompt, **options))
