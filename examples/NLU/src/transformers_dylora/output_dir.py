"""What to do with an output directory that is not empty."""

import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .errors import UsageError


def resume_point(args) -> str | None:
    """The checkpoint to go on from: --resume_from_checkpoint (a path, or true: the last one of --output_dir), or the
    last one that an interrupted run left there. None: start anew.

    Raises UsageError if there is no such checkpoint, or if the directory holds other files and --overwrite_output_dir
    was not given.
    """
    directory = Path(args.output_dir)
    last = get_last_checkpoint(str(directory)) if directory.is_dir() else None
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


def clear_checkpoints(args) -> None:
    """Remove an earlier run's checkpoints, so that no later run goes on from them by mistake."""
    for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
