"""A run that ends before its time: what stopped it, what is on disk, and how to go on, in one sentence."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerCallback

from .errors import UsageError
from .output_dir import has_ended, how_to_measure, last_whole_checkpoint

# Errors of a disk or a path, not of a program.
WRITING = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
}
# How torch and safetensors word them, which pass no number on.
WORDS = ("PytorchStreamWriter failed", "file write failed", "unexpected pos", "iostream error", "I/O error")


class Stopped(UsageError):
    """A run that was stopped from outside, with the exit code that says by which signal."""

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.exit_code = 128 + number


class _Stop(KeyboardInterrupt):
    """A signal, raised where the run stands. No Exception: nothing on the way takes it for its own failure."""


_caught: list[signal.Signals] = []  # the signal that came


def _stop(number: int, frame) -> None:
    _caught[:] = [signal.Signals(number)]
    raise _Stop


class StopBetweenSteps(TrainerCallback):
    """A signal that came while Python could raise nothing (in a finaliser, say) stops the run at the next step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if _caught:
            raise _Stop


@contextlib.contextmanager
def one_sentence(args) -> Iterator[None]:
    """Within the body SIGINT, SIGTERM and a disk that takes no more end in a UsageError that says how to go on."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    _caught.clear()
    try:
        yield
    except KeyboardInterrupt:
        number = _caught[0] if _caught else signal.SIGINT
        raise Stopped(f"stopped by {number.name}; {_how_to_go_on(args)}", number) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _not_written(error)
        if reason is None:
            raise
        file = getattr(error, "filename", None) or args.output_dir
        raise UsageError(f"{file} could not be written ({reason}); {_how_to_go_on(args)}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _not_written(error: Exception) -> str | None:
    """Why a file could not be written, or None if the error is another."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in WRITING else None
    return "the disk took no more" if any(words in str(error) for words in WORDS) else None


def _how_to_go_on(args) -> str:
    directory = Path(args.output_dir)
    checkpoint, _ = last_whole_checkpoint(directory)
    if args.do_train and checkpoint is None and has_ended(directory):
        return f"the training has ended and its adapter is saved: {how_to_measure(directory)}."
    if not args.do_train or checkpoint is None:
        return "there is no checkpoint to go on from: start again."
    return f"{checkpoint} is whole: the same command with --resume_from_checkpoint true goes on from there."


def exit_code(main: Callable[[], object], program: str) -> int:
    """Run a command; a user's mistake, or a stop, is one sentence on stderr, from one process."""
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        main()
    except Stopped as error:
        if first:
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except UsageError as error:
        if not first:
            time.sleep(10)  # the first process says the same, and the launcher then ends this one
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
