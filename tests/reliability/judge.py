"""How a case is judged. Whatever is given to a command, it either refuses in one clear sentence, or its numbers are right.

Never a traceback, never exit code 0 with a wrong result, never a change to what was given.
"""

import contextlib
import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_dylora.errors import UsageError

import loralib.cli

from . import world

LONGEST = 450  # a sentence is not a page


@dataclass(frozen=True)
class Case:
    """One thing that a user may do.

    Args:
        name: in a few words.
        argv: the command line, from the case's own copy of the world, which it may change first.
        refused: what the sentence must hold, as a regular expression; None: the command must succeed.
        right: looks at what came of it, and raises AssertionError; default: rank 3 scores 1.0.
        program: "run_glue" or "dylora".
        quick: whether it is tried in every run of the test suite, and not in scripts/soak.sh alone.
    """

    name: str
    argv: Callable[[Path], list]
    refused: str | None = None
    right: Callable[[Path, Any], None] | None = None
    program: str = "run_glue"
    quick: bool = False


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder but for what the command itself may write: ``out`` and caches."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).parts[0] not in ("out", "cache")
    }


def run(program: str, argv: list) -> tuple[str | None, Any]:
    """(the sentence that it was refused with, or None; what it gave)."""
    said = io.StringIO()
    argv = [str(argument) for argument in argv]
    if program == "dylora":
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()) as shown:
            try:
                code = loralib.cli.main(argv)
            except SystemExit as stop:  # argparse
                code = stop.code
        return (said.getvalue() if code else None), shown.getvalue()
    try:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(said):
            found = world.run_glue().main(argv)
    except UsageError as error:
        return str(error), None
    except SystemExit:  # argparse
        return said.getvalue(), None
    return None, (found, shown.getvalue())


def judge(case: Case, folder: Path) -> str:
    """Try a case in its own copy of the world; "refused" or "right". Raises AssertionError with what is wrong."""
    argv = case.argv(folder)
    before = contents(folder)
    sentence, found = run(case.program, argv)
    assert contents(folder) == before, "what was given has changed"
    if case.refused is None:
        assert sentence is None, f"refused: {sentence}"
        (case.right or best_rank_is_right)(folder, found)
        return "right"
    assert sentence is not None, "exit code 0"
    if "usage:" in sentence:  # argparse's own words
        sentence = sentence[sentence.rindex("error:") :]
    last = sentence.strip().splitlines()[-1]
    assert sentence.strip() == last, f"several lines: {sentence}"
    assert re.search(case.refused, last), last
    assert (
        len(last.replace(str(folder), "")) < LONGEST + 300 * ("x" * 300 in last)
        and "Traceback" not in last
        and "Error(" not in last
    ), last
    assert last.endswith((".", ")", ".sh")) or "error:" in last, last
    assert not (folder / "out" / "rank_results.json").exists(), "a table was written"
    return "refused"


def best_rank_is_right(folder: Path, found) -> None:
    results, _ = found
    rows = next(iter(results.splits.values()))
    assert rows[-1].rank == world.R and rows[-1].scores["accuracy"] == 1.0, rows
