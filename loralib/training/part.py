"""What the trainer's parts derive from: nothing, so that they can stand before any Trainer.

Their ``self`` is a Trainer all the same, which a type checker is told by taking the base for anything.
"""

from typing import Any

TrainerPart: Any = object
