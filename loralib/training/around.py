"""The part of the trainer that is around a training: what gives the same for less, and checkpointing at its ranks."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import TrainerCallback

from ..checkpointing import checkpoint_contexts
from ..model import has_lora, max_rank, set_rank
from ..schedule import BoundSchedule
from .part import TrainerPart
from .precision import frozen_weights_in
from .refusing import refuse_what_is_not_saved


class AtFullRank(TrainerCallback):
    """Other callbacks find the model at r_max, not at the ranks that the last step drew. After each step would be too
    often: a callback there sets the rank that it needs."""

    def _set(self, args, state, control, model=None, **_):
        if isinstance(model, nn.Module) and has_lora(model):
            set_rank(model, max_rank(model))

    on_epoch_end = on_evaluate = on_save = on_train_end = _set


class AroundTraining(TrainerPart):
    """Of ``DyLoRAMixin``: the contexts in which a model trains, and those in which it is measured."""

    bound: BoundSchedule | None
    contexts: contextlib.ExitStack | None  # around a training, None outside

    def _enter(self) -> None:
        """What is around the training of the model as it is now."""
        assert self.contexts is not None
        if self.bound is not None and self.model is not None:  # a search makes its models itself
            refuse_what_is_not_saved(self.model)
        self.contexts.enter_context(self._savings())
        self.contexts.enter_context(self._checkpointing_at_its_ranks())

    @contextlib.contextmanager
    def _savings(self):
        """What gives the same for less while the model is trained or measured.

        The model's own context in which its last block computes what the classifier reads, if it has one; and frozen
        weights in autocast's precision (see ``frozen_weights_in``), unless something else looks after the weights.
        """
        device = self.args.device.type
        with (
            self.accelerator.autocast()
        ):  # asked, since not every precision that is named is one that autocast uses here
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        others = (
            self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or self.args.bf16_full_eval
            or self.args.fp16_full_eval
            or self.args.torch_compile  # which rounds within its kernels
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(getattr(self.model, "first_token_only", contextlib.nullcontext)())
            if dtype and self.bound is not None and not others:
                stack.enter_context(frozen_weights_in(self.model, dtype, device))
            yield

    @contextlib.contextmanager
    def _checkpointing_at_its_ranks(self):
        """Where Trainer turns activation checkpointing on, blocks are computed again at the ranks they ran at."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        if self.bound is None or enable is None:
            yield
            return

        def enable_at_ranks(activation_checkpointing_kwargs=None, **options):
            given = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
            if given["use_reentrant"]:
                raise ValueError("Reentrant checkpointing would recompute at other ranks; leave out use_reentrant.")
            given.setdefault("context_fn", checkpoint_contexts(self.model))
            enable(activation_checkpointing_kwargs=given, **options)

        model = self.model
        model.activation_checkpointing_enable = enable_at_ranks
        try:
            yield
        finally:
            del model.activation_checkpointing_enable
