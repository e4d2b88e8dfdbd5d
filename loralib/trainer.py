"""The trainer under its public name: ``from loralib.trainer import DyLoRATrainer``."""

from .extras import missing

try:
    from .training.trainer import DyLoRAMixin, DyLoRATrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(missing(error), name=error.name) from error

__all__ = ["DyLoRAMixin", "DyLoRATrainer"]
