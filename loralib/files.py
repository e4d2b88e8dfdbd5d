"""Writing files so that a failure loses nothing of what was there."""

import os
from pathlib import Path


def write_together(directory: str | os.PathLike, writers: dict) -> None:
    """Write several files of a directory: {name: function of a temporary path}.

    All are written beside their places and synced, then renamed one right after the other: a failure while writing
    leaves the old files, all of them.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in writers}
    for name in writers:  # what a killed process left
        for stale in directory.glob(f".{name}.*.tmp"):
            stale.unlink(missing_ok=True)
    try:
        for name, write in writers.items():
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        for name, beside in temporary.items():
            os.replace(beside, directory / name)
    finally:
        for beside in temporary.values():
            beside.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file is what a killed process left of ``write_together``."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_atomically(path: str | os.PathLike, write) -> None:
    """Call ``write(temporary path)`` and rename the result to ``path``: a reader sees the old file or the whole new
    one."""
    write_together(Path(path).parent, {Path(path).name: write})


def save_npz(path: str | os.PathLike, arrays: dict) -> None:
    """Write numpy arrays, compressed."""
    import numpy as np

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def text_writer(text: str):
    return lambda temporary: temporary.write_text(text, encoding="utf-8")


def write_text(path: str | os.PathLike, text: str) -> None:
    write_atomically(path, text_writer(text))
