"""What to do with an output directory that is not empty."""

import shutil
from pathlib import Path

from .errors import UsageError


def resume_point(args) -> str | None:
    """The checkpoint to go on from: --resume_from_checkpoint (a path, or true: the last one of --output_dir), or the
    last one that an interrupted run left there. None: start anew.

    Raises UsageError if there is no such checkpoint, or if the directory holds other files and --overwrite_output_dir
    was not given.
    """
    directory = Path(args.output_dir)
    last = last_checkpoint(directory)
    asked = args.resume_from_checkpoint
    if asked and str(asked).lower() != "false":
        found = last if str(asked).lower() == "true" else asked
        if found is None or not Path(found).is_dir():
            raise UsageError(
                f"--resume_from_checkpoint {asked}: there is no checkpoint {found or f'in {directory}'} to go on from."
            )
        return str(found)
    if not args.do_train or args.overwrite_output_dir:
        return None
    if last is None and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"--output_dir {directory} is not empty and holds no run to go on with; choose another or add --overwrite_output_dir."
        )
    return last


def last_checkpoint(directory: Path) -> str | None:
    """The newest whole checkpoint of a run: the trainer's state is written last."""
    whole = [state.parent for state in directory.glob("checkpoint-*/trainer_state.json")]
    numbered = [path for path in whole if path.name.partition("-")[2].isdigit()]
    return str(max(numbered, key=lambda path: int(path.name.partition("-")[2]))) if numbered else None


def clear_run(args) -> None:
    """Remove what an earlier run left, so that no later run goes on from its checkpoints and no table mixes both."""
    directory = Path(args.output_dir)
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for pattern in ("eval_*r*_results.json", "test_results_*_r*.txt", "predictions_*.npz", "rank_results.*"):
        for file in directory.glob(pattern):
            file.unlink()
