"""The part of the trainer that writes and reads: checkpoints hold the adapter and the modules to save, in PEFT's
format."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_NAME

from ..adapters.card import model_card
from ..adapters.directory import CONFIG, EXTRA, read_configs, read_facts
from ..adapters.store import load_adapter, save_adapter
from ..files import write_text
from ..ordering import order_components
from ..schedule import FACTS, BoundSchedule
from .part import TrainerPart


@contextlib.contextmanager
def _writes_no_weights(model: torch.nn.Module, file: Path):
    """Within the body ``save_pretrained`` of the model does nothing; and ``file``, into which Trainer writes the
    weights of a model that is none of transformers', is afterwards as before."""
    own, aside = model.__dict__.get("save_pretrained"), file.with_name(f"{file.name}.aside")
    if file.exists():
        file.replace(aside)
    model.__dict__["save_pretrained"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.__dict__["save_pretrained"]
        if own is not None:
            model.__dict__["save_pretrained"] = own
        file.unlink(missing_ok=True)
        if aside.exists():
            aside.replace(file)


class AdapterCheckpoints(TrainerPart):
    """Of ``DyLoRAMixin``: an adapter where Trainer writes a whole model."""

    bound: BoundSchedule | None
    ordered: bool
    cut_short: bool
    began: bool
    adapter_facts: dict
    optimizer: Any

    def put_in_what_counts(self) -> None:
        """A schedule-free optimizer trains other values than a model is measured at and used with: put in the latter.
        The next training step, or the resumed one, takes it from there."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    def _save(self, output_dir=None, state_dict=None):
        self.put_in_what_counts()
        if self.bound is None:
            return super()._save(output_dir, state_dict)
        output_dir = Path(output_dir or self.args.output_dir)
        if self.args.should_save or self.is_fsdp_enabled:  # under FSDP all processes gather, and one writes
            save_adapter(self.model, output_dir, extra=self.training_facts() | self.adapter_facts)
        if not self.args.should_save:  # every process comes here, one writes
            return None
        output_dir.mkdir(parents=True, exist_ok=True)
        with _writes_no_weights(self.model, output_dir / SAFE_WEIGHTS_NAME):
            super()._save(str(output_dir), {})  # all else is Trainer's to write, and that of classes in between

    def _push_from_checkpoint(self, checkpoint_folder):
        """As Trainer's, which copies what it knows of a checkpoint to where it uploads from, and dylora.json too."""
        facts = Path(checkpoint_folder, EXTRA)
        if self.bound is not None and facts.is_file() and self.is_world_process_zero():
            write_text(Path(self.args.output_dir, EXTRA), facts.read_text(encoding="utf-8"))
        super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir=None, _internal_call=False):
        """As Trainer's, which under FSDP would gather the whole model first, or save nothing."""
        if self.bound is None or not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def training_facts(self) -> dict:
        """How ranks are trained, as ``dylora.json`` and ``rank_results.json`` tell it, and how far a training came that
        began; nothing without an adapter."""
        if self.bound is None:
            return {}
        come = {"ordered": self.ordered} if self.began else {}
        return self.bound.facts() | come | ({"cut_short": True} if self.cut_short else {})

    def create_model_card(self, *args, **kwargs):
        """loralib's card (see ``loralib.adapters.card``) for an adapter, unless a script has written a fuller one."""
        if self.bound is None:
            return super().create_model_card(*args, **kwargs)
        directory = Path(self.args.output_dir)
        if not (directory / CONFIG).exists():  # TRL asks for a card before a checkpoint is written
            return
        if self.is_world_process_zero() and not (directory / "README.md").exists():
            self.write_model_card()

    def write_model_card(self, results=None) -> None:
        """Write README.md beside the saved adapter; ``results``: the run's ``RankResults``."""
        name = getattr(self, "hub_model_id", None) or self.args.output_dir
        text = model_card(*read_configs(self.args.output_dir), results, name)
        write_text(Path(self.args.output_dir) / "README.md", text)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.bound is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_adapter(self.model, resume_from_checkpoint)
        facts, own = read_facts(resume_from_checkpoint), self.bound.facts()
        self.ordered = facts.get("ordered", False)
        told = [
            f"{name} was {facts[name]}, now {own[name]}" for name in FACTS if facts.get(name, own[name]) != own[name]
        ]
        if told:
            warnings.warn(
                f"{resume_from_checkpoint} was trained with another schedule: {'; '.join(told)}. What is saved will "
                "tell the one of now.",
                stacklevel=2,
            )

    def _load_best_model(self):
        self.put_in_what_counts()  # of the last step; what is loaded must not be taken for it
        if self.bound is None:
            return super()._load_best_model()
        best = self.state.best_model_checkpoint
        load_adapter(self.model, best)
        self.ordered = read_facts(best).get("ordered", False)
        # A checkpoint of the first part of the training has its components as they came.
        if self.bound.schedule.full_rank_share and not self.ordered:
            order_components(self.model)
            self.ordered = self.cut_short = True
            warnings.warn(
                f"The best model, {best}, is from before the ordering of its components: they are ordered now, and its "
                "lower ranks have other scores than it was chosen by.",
                stacklevel=2,
            )
