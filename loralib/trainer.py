"""The trainer under its public name: ``from loralib.trainer import DyLoRATrainer``."""

from .training.trainer import DyLoRATrainer

__all__ = ["DyLoRATrainer"]
