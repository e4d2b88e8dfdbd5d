"""A run that ends before its time says so in one sentence, keeps what is on disk, and says how to go on."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from transformers_dylora.errors import UsageError

from loralib.report.results import RankResults

from .test_run_glue import NLU, SCRIPT, cache, command, glue, run_glue

__all__ = ["cache", "glue"]  # fixtures
EACH = ["--save_strategy", "steps", "--save_steps", "1"]


def environment(tmp_path, **more) -> dict:
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    return os.environ | offline | {"PYTHON": sys.executable} | more


def started(argv, tmp_path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(tmp_path), **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_the_checkpoint_and_the_way_on(number, roberta_checkpoint, glue, tmp_path):
    out = tmp_path / "out"
    process = started(command(roberta_checkpoint, glue, out, "rte", *EACH, "--num_train_epochs", "5000"), tmp_path)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert (
        f"run_glue.py: stopped by {number.name}; {out}/checkpoint-" in said and "--resume_from_checkpoint true" in said
    )
    done = int(said.partition("checkpoint-")[2].partition(" ")[0])
    again = command(roberta_checkpoint, glue, out, "rte", *EACH, "--max_steps", str(done + 2), "--overwrite_output_dir")
    run_glue().main([*again, "--resume_from_checkpoint", "true"])
    assert (out / f"checkpoint-{done + 2}").is_dir() and RankResults.read(out / "rank_results.json")


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(roberta_checkpoint, glue, tmp_path):
    """A limit on the size of a file stands for the disk: the weights fit, the optimizer's state does not."""
    out = tmp_path / "out"
    argv = command(roberta_checkpoint, glue, out, "rte", *EACH)
    run_glue().main([*argv, "--max_steps", "1"])
    before = {file: file.read_bytes() for file in (out / "checkpoint-1").iterdir()}
    largest = max(len(content) for content in before.values())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 100,) * 2)  # noqa: E731
    process = started([*argv, "--num_train_epochs", "4"], tmp_path, preexec_fn=limit)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "could not be written" in said and f"{out}/checkpoint-1 is whole" in said
    assert {file: file.read_bytes() for file in (out / "checkpoint-1").iterdir()} == before


@pytest.mark.parametrize("where", ["file/out", "file", "x" * 300, "/proc/dylora/out"])
def test_an_output_path_that_cannot_be(where, roberta_checkpoint, glue, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UsageError, match=r"--output_dir .* cannot be written \(.*\); give another"):
        run_glue().main(command(roberta_checkpoint, glue, tmp_path / where))
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["file"]


@pytest.mark.slow
def test_overwriting_removes_the_old_adapter_just_before_the_first_step(roberta_checkpoint, glue, tmp_path):
    out = tmp_path / "out"
    argv = command(roberta_checkpoint, glue, out, "rte", "--overwrite_output_dir")
    run_glue().main(argv)
    kept = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "README.md", "rank_results.json"} <= kept
    for wrong in (
        ["--max_seq_length", "2"],
        ["--dataloader_drop_last", "--gradient_accumulation_steps", "50"],
        ["--lora_path", str(out)],
    ):
        with pytest.raises(UsageError):
            run_glue().main([*argv, *wrong])
        assert {path.name for path in out.iterdir()} == kept
    with pytest.raises(UsageError, match="lower the learning rate"):
        run_glue().main([*argv, "--learning_rate", "1e30", "--num_train_epochs", "9"])
    assert {path.name for path in out.iterdir()} <= {
        "config.yaml",
        "run_settings.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.slow
def test_two_processes_say_a_mistake_once(roberta_checkpoint, glue, tmp_path):
    done = subprocess.run(
        ["bash", NLU / "roberta_base_rte.sh", "--model_name_or_path", roberta_checkpoint, "--dataset_dir", glue, "--lora_path",
         "none", "--max_seq_length", "2", "--use_cpu", "true", "--per_device_train_batch_size", "8"],
        cwd=tmp_path, env=environment(tmp_path, NPROC="2"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("run_glue.py: --max_seq_length") == 1, done.stderr
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr


def test_fsdp_on_a_cpu_is_refused(roberta_checkpoint, glue, tmp_path, monkeypatch):
    argv = command(roberta_checkpoint, glue, tmp_path / "out")
    with pytest.raises(UsageError, match="--fsdp needs GPUs"):
        run_glue().main([*argv, "--fsdp", "full_shard"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="--fsdp needs GPUs"):
        run_glue().main(argv)
