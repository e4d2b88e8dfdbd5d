"""``transformers.Trainer`` that draws ranks in training and measures every rank in evaluation."""

import contextlib
import gc
import math
import re
import warnings
from dataclasses import replace
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import default_compute_objective

from ..frozen import freeze_undrawn
from ..gate import check_rank
from ..layout import examples_in
from ..model import get_rank, has_lora, max_rank, refuse_trained_biases, scaling_of, set_rank
from ..momenta import unwrapped_optimizer
from ..ordering import order_components
from ..pacing import set_paces
from ..schedule import BoundSchedule, RankSchedule, Setting
from ..strengths import forget_strengths
from .around import AroundTraining, AtFullRank
from .batching import Place
from .evaluation import EvaluationOfRanks
from .fitting import Fitting
from .loading import ExactBatches
from .measuring import Measurements
from .refusing import refuse_scattered_factors
from .saving import AdapterCheckpoints
from .weighing import WeighedLosses

# What is private in transformers and overridden, called or read in this package;
# tests/loralib/training/test_contract.py holds the installed release to it.
PRIVATE = (
    "_get_train_sampler",
    "_get_eval_sampler",
    "_get_dataloader",
    "_get_grad_norm",
    "_prepare_inputs",
    "_save",
    "_load_from_checkpoint",
    "_load_best_model",
    "_push_from_checkpoint",
    "_train_batch_size",
)


@contextlib.contextmanager
def _as_adapted(model):
    """Trainer trains a quantised model where an adapter of PEFT's is loaded: ours is as good."""
    ours = isinstance(model, torch.nn.Module) and has_lora(model) and getattr(model, "is_quantized", False)
    before = getattr(model, "_hf_peft_config_loaded", None)
    if ours:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if ours:
            model._hf_peft_config_loaded = bool(before)


class DyLoRAMixin(
    ExactBatches, EvaluationOfRanks, Measurements, Fitting, AdapterCheckpoints, AroundTraining, WeighedLosses
):
    """Put before Trainer or a subclass of it: ``class MyTrainer(DyLoRAMixin, Seq2SeqTrainer)``.

    For a model with loralib layers; one without any gets plain training with exact batches.

    Training. Before each micro-batch the model is set to what the schedule says for the step. The examples of an
    update, their order and (per example) their ranks do not depend on how the update is split into micro-batches and
    processes, nor do the loss and the gradient: every example weighs 1/n in an update of n.

    Evaluation. One pass over the data gives the predictions of every rank, (samples, ranks, ..), one array or several.
    ``preprocess_logits_for_metrics`` and ``compute_metrics`` are called once per rank, unchanged, and the scores
    reported as ``eval_r1_accuracy`` .. ``eval_r8_accuracy``, their mean ``eval_mean_accuracy`` and the area under the
    rank-quality curve ``eval_aurac_accuracy``. ``eval_r1_loss`` is the mean over all that the loss counts (examples, or
    tokens), however batches are cut, ``eval_loss`` the mean over ranks; language models' own losses have
    ``eval_r1_perplexity`` too. Without ``compute_metrics`` the losses alone are reported. Predictions come in the
    data's order.

    ``fit_strengths`` learns, after a training, how strong each layer's update should be at each rank.

    ``measure_ranks`` also writes the results, so that ``dylora select``, ``report`` and ``export --rank auto`` work on
    the output directory.

    Checkpoints hold the adapter and the modules to save, in PEFT's format.

    Args (beside the trainer's):
        schedule: how ranks are trained; default ``RankSchedule()``. Where it has no seed, the trainer's counts.
        eval_ranks: the ranks to measure, default 1..r_max.
        group_by_length: put examples of like length into an update (default), or shuffle only.
        adapter_facts: what to add to ``dylora.json`` beside a saved adapter.

    Raises ValueError for settings that contradict each other.
    """

    def __init__(
        self,
        *args,
        schedule: RankSchedule | None = None,
        eval_ranks: list[int] | None = None,
        group_by_length: bool = True,
        adapter_facts: dict | None = None,
        **kwargs,
    ):
        self._refuse_generated()
        with _as_adapted(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, AtFullRank())  # before those of the user
        self.bound: BoundSchedule | None = None  # the schedule with its defaults settled; None without an adapter
        self.eval_ranks: list[int] = []
        self.asked = schedule or RankSchedule(), eval_ranks
        self.contexts: contextlib.ExitStack | None = None  # around a training
        self._bind()
        refuse_scattered_factors(self)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would split the batch but not its ranks; start one process per "
                f"GPU: torchrun --nproc_per_node={self.args.n_gpu} ..."
            )
        if self.args.train_sampling_strategy == "batch_rebalance" or self.args.batch_eval_metrics:
            raise ValueError(
                "DyLoRATrainer orders its batches itself and measures all ranks at the end: leave out "
                "--train_sampling_strategy batch_rebalance and --batch_eval_metrics."
            )
        if not self.args.eval_do_concat_batches:
            raise ValueError("eval_do_concat_batches is False; results are put in the data's order: leave it at True.")
        if (
            self.bound is not None
            and self.bound.schedule.sampling == "example"
            and getattr(self, "padding_free", False)
        ):
            raise ValueError(
                "A padding-free batch is one row, whose examples cannot have a rank each: give "
                "RankSchedule(sampling='step'), or leave out padding_free (for packing: packing_strategy='wrapped')."
            )
        if self.bound is not None and self.args.torch_compile and self.args.activation_checkpointing:
            raise ValueError(
                "torch.compile cannot compute a block again at the ranks that it ran at: leave out torch_compile or "
                "activation_checkpointing."
            )
        if self.bound is not None:
            refuse_trained_biases(self.model)
        self._check_enough()
        self.group_by_length, self.adapter_facts = group_by_length, adapter_facts or {}
        self.place = Place()
        self.ordered = False  # whether the components were put in order in this training,
        self.cut_short = False  # whether that was after its end, and
        self.began = False  # whether there was one
        self.knows_loss = False  # whether the loss was asked if it divides by num_items_in_batch, and
        self.loss_divides = True  # whether it does
        self.frozen_by: Any = None  # the optimizer that freeze_undrawn watches
        if str(self.args.metric_for_best_model).endswith("perplexity"):
            self.args.greater_is_better = False  # Trainer knows of losses alone that less is better

    def _bind(self) -> None:
        """Settle the schedule and the ranks to measure for the model's adapter."""
        schedule, ranks = self.asked
        self.bound, self.eval_ranks = None, []
        if has_lora(self.model):
            r_max = max_rank(self.model)
            schedule = replace(schedule, seed=self.args.seed) if schedule.seed is None else schedule
            self.bound = schedule.resolve(r_max, scaling_of(self.model))
            self.eval_ranks = sorted({check_rank(b, r_max) for b in ranks or range(1, r_max + 1)})

    def train(self, *args, **kwargs):
        """As Trainer's; afterwards the model runs at r_max."""
        self.ordered, self.cut_short, self.began = False, False, True  # a checkpoint to go on from may know better
        try:
            if self.model is not None:
                forget_strengths(self.model)
            with contextlib.ExitStack() as self.contexts:
                self._enter()
                output = super().train(*args, **kwargs)
            self._order_what_ended_early()
            return output
        finally:
            self.contexts = None
            self.put_in_what_counts()
            if self.bound is not None:
                set_rank(self.model, self.bound.r_max)
                if self.bound.schedule.paced and self.optimizer is not None:
                    set_paces(self.optimizer, self.model, None)

    def _order_what_ended_early(self) -> None:
        """A callback may end a training before its ordering: then its components are ordered now."""
        if self.bound is None or not self.bound.schedule.full_rank_share or self.ordered or not self.state.global_step:
            return
        order_components(self.model, self.optimizer)
        self.ordered = self.cut_short = True
        warnings.warn(
            f"The training ended at update {self.state.global_step}, before its components were to be ordered: they "
            "are ordered now, and its lower ranks were not trained.",
            stacklevel=3,
        )

    def call_model_init(self, trial=None):
        """As Trainer's, which makes a model anew for each training; its adapter may have another r_max in each
        trial."""
        model = super().call_model_init(trial)
        if getattr(self, "contexts", None) is not None:
            self.contexts.close()
            self.model = model
            self._bind()
            self._enter()
        return model

    def end(self):
        """As Trainer's, but the process group's threads end now: the wrapper around the model would keep it alive until
        the interpreter is torn down, where gloo's threads abort the process now and then."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()
        gc.collect()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.place.begin_micro_batch()
        if self.bound is not None:
            self._freeze_undrawn()
            rows = examples_in(inputs)
            setting = self.training_setting(rows)
            self._refuse_more_rows(setting, rows)
            setting.apply(self.model, self.optimizer)
            self.ordered |= setting.order
        with self.weighed():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._refuse_non_finite("loss", loss)
        return loss

    @staticmethod
    def _refuse_more_rows(setting: Setting, rows: int) -> None:
        """Raise ValueError where a collator makes several rows of an example, as for pairs of preferences."""
        if isinstance(setting.rank, torch.Tensor) and len(setting.rank) != rows:
            raise ValueError(
                f"A batch has {rows} rows for {len(setting.rank)} examples, so that a rank per example does not say "
                "which row runs at which: give RankSchedule(sampling='step')."
            )

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer's norm of the gradient; one that is not finite stops the run, unless fp16's scaler looks after it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and norm is not None:
            self._refuse_non_finite("gradient's norm", norm)
        return norm

    def _refuse_non_finite(self, what: str, value) -> None:
        """Raise FloatingPointError: what came before stays as it was saved, and nothing is built on nan."""
        if not math.isfinite(float(value)):
            size = (
                ""
                if self.place.batches is None
                else f" of {self.place.batches.update_size(self.place.update)} examples"
            )
            raise FloatingPointError(
                f"The {what} is {float(value)} in update {self.state.global_step + 1}{size}, at rank "
                f"{self._rank_in_words()}; lower the learning rate or look at the data. What was saved before stays."
            )

    def _rank_in_words(self) -> str:
        if self.bound is None:
            return "0"
        rank = get_rank(self.model)
        if rank is None:
            return "mixtures"
        low, high = (rank, rank) if isinstance(rank, int) else (int(rank.min()), int(rank.max()))
        return str(low) if low == high else f"{low} to {high}"

    def training_setting(self, batch_size: int) -> Setting:
        """What the schedule says for the micro-batch that comes."""
        assert self.bound is not None
        schedule = self.bound.schedule
        if self.asked[0].seed is None:  # a search over seeds sets the trainer's after the model is made
            schedule = replace(schedule, seed=self.args.seed)
        self.bound = replace(self.bound, schedule=schedule, steps=self.state.max_steps)
        if self.state.global_step < self.bound.full_steps:
            self.ordered = (
                False  # a checkpoint of a shorter training may have ordered earlier: this one orders at its own time
            )
        return self.bound.setting(
            self.state.global_step,
            self.place.size(batch_size),
            self.place.micro,
            self.args.process_index,
            self.place.places(),
            self.ordered,
        )

    def _freeze_undrawn(self) -> None:
        """Where the schedule is frozen, have the optimizer that is in use leave alone what is not drawn."""
        optimizer = unwrapped_optimizer(self.optimizer)
        if self.bound is not None and self.bound.schedule.frozen and self.frozen_by is not optimizer:
            freeze_undrawn(optimizer, self.model)
            self.frozen_by = optimizer

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As Trainer's; without an objective it is the area under each score's curve, or the loss where there is no
        score. Trainer's own is the sum of all metrics, losses of ranks among them."""
        return super().hyperparameter_search(hp_space, compute_objective or _objective, *args, **kwargs)


def _objective(metrics: dict[str, float]) -> float:
    """Of several evaluation sets, whose metrics have the set's name before their own, the sum."""
    if areas := [value for name, value in metrics.items() if re.match("eval_(.+_)?aurac_", name)]:
        return sum(areas)
    if not any(re.match(r"eval_(.+_)?r\d+_loss$", name) for name in metrics):
        return default_compute_objective(metrics)
    return sum(v for name, v in metrics.items() if re.match(r"eval_(?!(.+_)?r\d+_loss$)(.+_)?loss$", name))


class DyLoRATrainer(DyLoRAMixin, Trainer):
    """``transformers.Trainer`` with ``DyLoRAMixin``, whose arguments it takes beside Trainer's."""
