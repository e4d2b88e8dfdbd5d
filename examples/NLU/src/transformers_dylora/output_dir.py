"""What to do with an output directory that is not empty."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loralib.adapters.directory import hash_of_weights
from loralib.files import is_temporary
from loralib.report.writing import TABLES

from .errors import UsageError
from .identity import FILE
from .settings import FILE as CONFIG


def resume_point(args) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from, and notes: --resume_from_checkpoint (a path, or true: the last whole one of
    --output_dir), or the last whole one that an interrupted run left there. None: start anew.

    Raises UsageError if there is no such checkpoint, if one that was named is damaged, or if the directory holds other
    files than a run's and --overwrite_output_dir was not given.
    """
    directory = Path(args.output_dir)
    asked = args.resume_from_checkpoint
    by_path = asked and str(asked).lower() not in ("false", "true")
    if by_path:
        if not Path(asked).is_dir():
            raise UsageError(f"--resume_from_checkpoint {asked}: there is no checkpoint {asked} to go on from.")
        damage = damage_of(Path(asked))
        if damage:
            raise UsageError(f"--resume_from_checkpoint {asked} is damaged ({damage}); give another checkpoint.")
        others = Path(asked).resolve().parent != directory.resolve() and (directory / "train_results.json").exists()
        if args.do_train and others and not args.overwrite_output_dir:
            raise UsageError(
                f"--output_dir {directory} holds another run, which has ended; choose another directory, or add "
                "--overwrite_output_dir."
            )
        return str(asked), []
    wanted = asked and str(asked).lower() == "true"
    if not wanted and (not args.do_train or args.overwrite_output_dir):
        return None, []
    last, notes = last_whole_checkpoint(directory)
    if last is None and wanted:
        raise UsageError(f"--resume_from_checkpoint {asked}: there is no checkpoint in {directory} to go on from.")
    unfinished = (directory / FILE).exists() and not (directory / "train_results.json").exists()
    held = [path for path in directory.iterdir() if not is_temporary(path)] if directory.is_dir() else []
    if last is None and has_ended(directory):
        raise UsageError(
            f"--output_dir {directory} holds a run that has ended; {how_to_measure(directory)}, choose another "
            "directory, or add --overwrite_output_dir to start anew."
        )
    if last is None and held and not unfinished:
        raise UsageError(
            f"--output_dir {directory} is not empty and holds no run to go on with; choose another or add "
            "--overwrite_output_dir."
        )
    return last, notes


def has_ended(directory: Path) -> bool:
    """Whether a training came to its end there, and its adapter is saved."""
    return (directory / "train_results.json").exists() and (directory / "adapter_model.safetensors").exists()


def how_to_measure(directory: Path) -> str:
    return f"measure it with dylora train --do_eval --lora_path {directory} --output_dir {directory}"


def checkpoints(directory: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    numbered = [path for path in directory.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(numbered, key=lambda path: -int(path.name.partition("-")[2]))


def last_whole_checkpoint(directory: Path) -> tuple[str | None, list[str]]:
    """The newest checkpoint that is whole, and a note for each newer one that is not."""
    notes = []
    for path in checkpoints(directory):
        damage = damage_of(path)
        if damage is None:
            return str(path), notes
        notes.append(f"{path} is damaged ({damage}) and passed over")
    return None, notes


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, empty or cut off; None if it is whole.

    Weights are read through safetensors' header, torch's files through their archive's checksums.
    """
    weights = [name for name in ("adapter_model.safetensors", "model.safetensors") if (checkpoint / name).exists()]
    if not weights and not (checkpoint / "model.safetensors.index.json").exists():
        return "it holds no weights"
    needed = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "training_args.bin", *weights]
    if (checkpoint / "adapter_model.safetensors").exists():
        needed += ["adapter_config.json", "dylora.json"]
    states = sorted(path.name for path in checkpoint.glob("rng_state*.pth"))
    if not states:
        return "rng_state.pth is missing"
    for name in [*needed, *states]:
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    opened.keys()
            else:
                with zipfile.ZipFile(file) as archive:
                    # zipfile takes an archive behind other bytes, torch does not
                    behind = min((entry.header_offset for entry in archive.infolist()), default=1)
                    if behind or archive.testzip() is not None:
                        return f"{name} is cut off"
        except (ValueError, OSError, zipfile.BadZipFile, SafetensorError):
            return f"{name} cannot be read"
    return None


# What a run leaves in its output directory, beside its checkpoints.
LEFT = (
    *(
        "adapter_config.json",
        "adapter_model.safetensors",
        "dylora.json",
        "model.safetensors",
        "README.md",
        FILE,
        CONFIG,
    ),
    *("trainer_state.json", "training_args.bin", "train_results.json"),
    *TABLES,
)


# One of these is in every directory that a run wrote to.
MARKS = (FILE, CONFIG, "dylora.json", "trainer_state.json", "training_args.bin", "rank_results.json")


def clear_run(directory: Path) -> None:
    """Remove what an earlier run left, so that no later run goes on from its checkpoints and nothing mixes both.

    Where no run was, nothing is removed.
    """
    if not any((directory / name).exists() for name in MARKS):
        return
    for checkpoint in checkpoints(directory):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for file in (file for pattern in LEFT for file in directory.glob(pattern)):
        file.unlink()


def check_output_dir(args, starts: dict[str, str | None]) -> None:
    """Raise UsageError if nothing can be written to --output_dir, if what the training starts from, {flag: path}, would
    be removed from it, or if the tables of an adapter in it would be replaced by those of another."""
    directory = Path(args.output_dir)
    for flag, path in starts.items() if args.do_train and args.overwrite_output_dir else ():
        if path and Path(path).exists() and Path(path).resolve().is_relative_to(directory.resolve()):
            raise UsageError(f"--overwrite_output_dir would remove {flag} {path}; give another --output_dir.")
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(
            f"--output_dir {directory} cannot be written ({error.strerror}); give another, or make it writable."
        ) from None
    finally:
        for path in made:  # it is made again when there is something to write
            with contextlib.suppress(OSError):  # another process may have put something there by now
                path.rmdir()
    own, measured = hash_of_weights(directory), starts.get("--lora_path")
    if own and not args.do_train and not args.overwrite_output_dir and own != hash_of_weights(measured or directory):
        raise UsageError(
            f"--output_dir {directory} holds another adapter than --lora_path {measured}, and its tables would be "
            "replaced; give another directory, or add --overwrite_output_dir."
        )
