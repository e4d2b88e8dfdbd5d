"""A run goes on only as itself, from a checkpoint that is whole."""

import json
import shutil

import datasets
import pytest
from transformers_dylora.arguments import parse
from transformers_dylora.errors import UsageError
from transformers_dylora.identity import check_continuation, settings_of, store
from transformers_dylora.output_dir import damage_of, last_whole_checkpoint
from transformers_dylora.tasks import TASKS

from .test_run_glue import cache, command, glue, run_glue

__all__ = ["cache", "glue"]  # fixtures
EACH = ["--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "4"]


@pytest.fixture(scope="module")
def finished(roberta_checkpoint, glue, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *EACH))
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.slow
def test_a_longer_training_goes_on_and_orders_at_its_own_time(out, roberta_checkpoint, glue, tmp_path, capsys):
    steps = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    facts = json.loads((out / f"checkpoint-{steps}" / "dylora.json").read_text())
    assert facts["ordered"]
    longer = [*EACH[:-1], str(3 * int(EACH[-1]))]
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *longer))
    assert f"num_train_epochs {EACH[-1]}.0 is now" in capsys.readouterr().out
    first = json.loads((out / f"checkpoint-{steps + 1}" / "dylora.json").read_text())
    last = json.loads((out / f"checkpoint-{3 * steps}" / "dylora.json").read_text())
    assert not first["ordered"] and last["ordered"]  # a third of the new length: all components together, for now


@pytest.mark.slow
def test_a_run_that_differs_goes_on_when_told_to(out, roberta_checkpoint, glue, capsys):
    argv = command(roberta_checkpoint, glue, out, "rte", *EACH, "--learning_rate", "1e-5", "--resume_anyway")
    run_glue().main(argv)
    assert "going on with other settings than before: learning_rate was" in capsys.readouterr().out


def test_what_is_stored_of_a_schedule_is_settled(tmp_path):
    """A default that changes with a release makes a run another one; settings of a release that did not settle them
    say nothing of it."""
    args = [
        "--model_name_or_path",
        "m",
        "--task_name",
        "rte",
        "--output_dir",
        str(tmp_path),
        "--apply_lora",
        "--do_train",
    ]
    model_args, data_args, training_args = parse(args)
    train = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [0]})
    settings = settings_of(model_args, data_args, training_args, TASKS["rte"], train)
    assert (settings["rank_distribution"], settings["full_rank_share"], settings["lora_paced"]) == ("mixed", 0.8, False)
    store(tmp_path, settings | {"full_rank_share": 0.5})
    with pytest.raises(UsageError, match=r"full_rank_share was 0\.5, now 0\.8"):
        check_continuation(tmp_path, settings, False)
    store(tmp_path, settings | {"full_rank_share": None, "lora_paced": None})
    assert check_continuation(tmp_path, settings, False) == []


NAMES = ["adapter_model.safetensors", "adapter_config.json", "dylora.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trainer_state.json", "training_args.bin"]  # fmt: skip
DAMAGE = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_noticed(name, how, out):
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert damage_of(newest) is None
    DAMAGE[how](newest / name)
    damage = damage_of(newest)
    assert damage is not None
    found, notes = last_whole_checkpoint(out)
    assert found != str(newest) and notes == [f"{newest} is damaged ({damage}) and passed over"]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(out, roberta_checkpoint, glue):
    for path in out.iterdir():
        if path.name != "run_settings.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "checkpoint-1").mkdir()  # begun, and not whole
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *EACH))
    assert (out / "rank_results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--learning_rate", "1e30"], ["--learning_rate", "1e30", "--bf16"]])
def test_numbers_that_are_not_finite_stop_the_run(more, roberta_checkpoint, glue, tmp_path):
    argv = command(roberta_checkpoint, glue, tmp_path / "out", "rte", *EACH, *more)
    with pytest.raises(
        UsageError, match=r"The (loss|gradient's norm) is (nan|inf) in update \d+ of \d examples, at rank"
    ):
        run_glue().main(argv)
    assert not (tmp_path / "out" / "rank_results.json").exists()
