"""What the trainer's parts derive from: nothing, so that they can stand before any Trainer.

Their ``self`` is a Trainer all the same, which a type checker is told by taking the base for anything.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

TrainerPart: Any = object


@contextlib.contextmanager
def without_notes(trainer: Any) -> Iterator[None]:
    """Passes in the body are none of the run's: what TRL's trainers note of each loss is afterwards as before."""
    noted = copy.deepcopy(getattr(trainer, "_metrics", None))
    try:
        yield
    finally:
        if noted is not None:
            trainer._metrics = noted
