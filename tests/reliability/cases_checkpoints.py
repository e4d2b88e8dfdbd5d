"""Checkpoints and runs: what is damaged is passed over or refused, and a run goes on only as itself."""

import json
from pathlib import Path

from safetensors.torch import load_file

from .judge import Case, contents, run
from .world import train

MORE = ["--save_strategy", "steps", "--save_steps", "2"]
NAMES = (
    "adapter_config.json", "adapter_model.safetensors", "dylora.json", "optimizer.pt", "rng_state.pth", "scheduler.pt",
    "trainer_state.json", "training_args.bin",
)  # fmt: skip
DAMAGE = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


def moved(folder: Path) -> Path:
    """The run as the case's own output directory."""
    (folder / "run").rename(folder / "out")
    for name in ("rank_results.json", "train_results.json"):
        (folder / "out" / name).unlink()  # as if it had been stopped
    return folder / "out"


def damaged(how: str, name: str):
    def argv(folder: Path):
        DAMAGE[how](moved(folder) / "checkpoint-4" / name)
        return [*train(folder, folder / "out"), *MORE]

    return argv


def went_on_from_2(folder: Path, found):
    """... and came to the same adapter as the run that was not stopped."""
    out = folder / "out"
    assert f"{out}/checkpoint-4 is damaged" in found[1] and f"going on from {out}/checkpoint-2" in found[1]
    sentence, _ = run("run_glue", [*train(folder, folder / "cache" / "whole"), *MORE])
    assert sentence is None
    ours, whole = (load_file(d / "adapter_model.safetensors") for d in (out, folder / "cache" / "whole"))
    assert all(bool((ours[key] == whole[key]).all()) for key in whole)


def named(how: str, name: str):
    def argv(folder: Path):
        checkpoint = moved(folder) / "checkpoint-4"
        DAMAGE[how](checkpoint / name)
        return [*train(folder, folder / "out"), *MORE, "--resume_from_checkpoint", checkpoint]

    return argv


def other(*flags):
    return lambda folder: [moved(folder), [*train(folder, folder / "out"), *MORE, *flags]][1]


def in_a_directory(files: dict[str, str], *flags):
    def argv(folder: Path):
        (folder / "out").mkdir()
        for name, text in files.items():
            (folder / "out" / name).write_text(text)
        return [*train(folder, folder / "out"), *flags]

    return argv


def finished_again(folder: Path):
    """The finished run's own command once more: nothing is trained, the tables are the same."""
    (folder / "run").rename(folder / "out")
    return [*train(folder, folder / "out"), *MORE]


def nothing_new(folder: Path, found):
    table = json.loads((folder / "out" / "rank_results.json").read_text())
    assert [row["accuracy"] for row in table["splits"]["validation"]] == [
        r.scores["accuracy"] for r in found[0].splits["validation"]
    ]


def kept(folder: Path, found):
    assert (folder / "out" / "thesis.txt").read_text() == "years of work" and contents(folder)


CASES = [
    *(
        Case(f"{name} {how}: the last whole one", damaged(how, name), right=went_on_from_2, quick=(how, name) == ("half", "optimizer.pt"))
        for name in NAMES for how in DAMAGE
    ),
    *(
        Case(f"{name} {how}, named by its path", named(how, name), "is damaged .* give another checkpoint", quick=how == "missing")
        for name in NAMES for how in DAMAGE
    ),
    Case("stopped and gone on", other(), right=lambda folder, found: None, quick=True),
    Case("finished, once more", finished_again, right=nothing_new),
    Case("gone on with another seed", other("--seed", "9"), "seed was 3, now 9.*--resume_anyway", quick=True),
    Case("gone on with another rate", other("--learning_rate", "1"), "learning_rate was"),
    Case("gone on with another rank", other("--lora_r", "2"), "lora_r was 3, now 2|going on|rank"),
    Case("gone on with another alpha", other("--lora_alpha", "4"), "lora_alpha"),
    Case("gone on with other sampling", other("--rank_sampling", "step"), "rank_sampling was example, now step"),
    Case("gone on with other examples", other("--max_train_samples", "8"), "data was 24 examples"),
    Case("gone on with a larger batch", other("--gradient_accumulation_steps", "2"), "examples per update was 8, now 16"),
    Case("gone on with another length of text", other("--max_seq_length", "16"), "max_seq_length was 32, now 16"),
    Case("gone on, split otherwise", other("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
         right=lambda folder, found: None),
    Case("gone on longer", other("--max_steps", "6"), right=lambda folder, found: None),
    Case("a directory of other files", in_a_directory({"thesis.txt": "years of work"}), "is not empty and holds no run", quick=True),
    Case("a directory of a killed run's first file", in_a_directory({".run_settings.json.123.tmp": "{"}), right=lambda folder, found: None),
    Case("a directory of other files, overwritten", in_a_directory({"thesis.txt": "years of work"}, "--overwrite_output_dir"), right=kept),
    Case("settings that are no JSON", lambda folder: [(moved(folder) / "run_settings.json").write_text("{"),
         [*train(folder, folder / "out"), *MORE]][1], "run_settings.json is no JSON"),
    Case("an output path below a file", lambda folder: train(folder, folder / "rte" / "train.jsonl" / "out"), "cannot be written"),
    Case("an output path that is a file", lambda folder: train(folder, folder / "rte" / "train.jsonl"), "cannot be written"),
    Case("an output path of 300 letters", lambda folder: train(folder, folder / ("x" * 300)), "cannot be written"),
    Case("an output path that is empty", lambda folder: train(folder, ""), "output_dir"),
]  # fmt: skip
