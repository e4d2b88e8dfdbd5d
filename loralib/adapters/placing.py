"""A directory that a command writes whole, and writes again over nothing but what it wrote itself."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from ..files import is_temporary
from .directory import CONFIG, EXTRA, WEIGHTS, read_facts
from .hub import TOKENIZER

# What such a command may write beside dylora.json.
WRITTEN = (CONFIG, WEIGHTS, "README.md", "config.json", "generation_config.json", "model*.safetensors*", *TOKENIZER)


def free_directory(directory: str | Path, made_by: str) -> Path:
    """``directory`` if writing there loses nothing but what ``made_by`` wrote before: it is new or empty, or its
    dylora.json says so and each file is as it was left. Raises ValueError for any other, NotADirectoryError below a
    file."""
    path = Path(directory).resolve()
    if not next(above for above in path.parents if above.exists()).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    facts = read_facts(path) if path.is_dir() else {}
    if facts.get("made_by") != made_by:
        raise ValueError(f"--to {directory} holds other files; give a new or empty directory.")
    left = facts.get("files") or {}
    for file in sorted(path.iterdir()):
        ours = any(fnmatch(file.name, pattern) for pattern in WRITTEN)
        if ours and file.is_file() and left.get(file.name) != _hash(file):
            raise ValueError(
                f"--to {directory} holds a {file.name} that is not as {made_by} left it; give a new or empty directory."
            )
    return path


@contextmanager
def written_whole(directory: Path, made_by: str) -> Iterator[Path]:
    """Within, an empty directory to write to, dylora.json among the rest; afterwards its files take their places in
    ``directory``, and those that ``made_by`` wrote there before make way. After an error nothing there is touched."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".") as work:
        made = Path(work)
        yield made
        files = {file.name: _hash(file) for file in sorted(made.iterdir()) if file.name != EXTRA}
        facts = read_facts(made) | {"made_by": made_by, "files": files}
        (made / EXTRA).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        directory.mkdir(exist_ok=True)
        for name in read_facts(directory).get("files", {}).keys() - files.keys():
            (directory / Path(name).name).unlink(missing_ok=True)
        for file in sorted(made.iterdir(), key=lambda file: file.name == WEIGHTS):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file, directory / file.name)
        for stale in filter(is_temporary, directory.iterdir()):
            stale.unlink(missing_ok=True)


def _hash(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]
