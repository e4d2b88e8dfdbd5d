"""Models under FSDP2, in two processes on a CPU, beside the same in one piece (see two_processes.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loralib as lora
from loralib.model import lora_layers

from .helpers import free_port


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each of the two processes found."""
    directory = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script), str(directory), str(free_port())]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((directory / f"answers-{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("door", ["inject", "peft"])
@pytest.mark.parametrize(
    "what", ["trained", "ordered", "moments", "trained on", "trained at paces", "runs", "merged", "loaded"]
)
def test_two_parts_are_the_whole(door, what, answers):
    # AdamW's first steps divide by what may be tiny.
    assert all(found[door][what] < (1e-5 if "trained" in what or what == "ordered" else 2e-6) for found in answers)


@pytest.mark.parametrize("door", ["inject", "peft"])
def test_one_process_writes_the_whole_adapter(door, answers):
    assert answers[0][door]["saved"] < 1e-5
    assert answers[1][door]["other process writes"] is False


@pytest.mark.parametrize("door", ["inject", "peft"])
def test_merging_gives_a_plain_model_and_leaves_the_parts_alone(door, answers):
    for found in answers:
        assert found[door]["merged is plain"] and found[door]["runs after merging a copy"] < 2e-6
        assert found[door]["generates"]


def test_frozen_components_stay_where_they_are(answers):
    for found in answers:
        assert found["frozen"]["trained"] < 1e-5 and found["frozen"]["undrawn moved by"] == 0


def test_strengths_are_fitted_on_the_batches_of_all_processes(answers):
    for found in (each["strengths"] for each in answers):
        assert found["apart"] < 1e-5 < 1e-2 < found["moved"]
        assert "fit its saved adapter in one process" in found["under FSDP"]


def test_what_fsdp_would_not_see_is_refused(answers):
    for found in (each["inject"] for each in answers):
        assert "from a batch of 2 or more in each" in found["one example beside two"]
    assert "loralib.merge(model, rank) gives a whole model" in found["a layer's merge"]
    assert found["a layer's merge"] == found["a layer's merge after a pass"]
    assert "leave out inplace" in found["merge in place"]
    assert "call inject before fully_shard" in found["inject too late"]


def test_the_trainer_trains_and_resumes_as_without(answers):
    for found in answers:
        assert found["trainer"]["sharded"]
        assert found["trainer"]["loss"] < 1e-5 and found["trainer"]["saved"] < 1e-5
        assert found["trainer"]["resumed"] == 0 and found["trainer"]["resumed loss"] == 0


def test_factors_without_numbers_are_not_saved(tmp_path):
    """As DeepSpeed's ZeRO stage 3 leaves them."""
    model = lora.inject(torch.nn.Sequential(torch.nn.Linear(3, 3)), ["0"], r=2)
    lora_layers(model)[0][1].lora_A.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"'0' has factors without numbers, .* ZeRO stage 3"):
        lora.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
