"""``transformers.Trainer`` that draws ranks in training and measures every rank in evaluation."""

import contextlib
import gc
import inspect
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import nested_truncate
from transformers.trainer_utils import has_length

from ..adapters.card import model_card
from ..adapters.directory import read_configs, read_facts
from ..adapters.store import load_adapter, save_adapter
from ..all_ranks import passes, share_between_ranks
from ..files import write_text
from ..frozen import freeze_undrawn
from ..gate import check_rank
from ..model import has_lora, lora_layers, max_rank, set_matryoshka_gate, set_rank, use_rank
from ..ordering import order_components
from ..report.tables import aurac
from ..sampling import RankSampler
from .batching import ByLength, GroupedBatches
from .precision import frozen_weights_in

SAMPLINGS = ("example", "step", "matryoshka", "fixed")
DRAWN = ("example", "step")
FULL_RANK_SHARE = 0.5


class DyLoRATrainer(Trainer):
    """Trainer for a model with loralib layers; for a model without any it is a plain Trainer with exact batches.

    Training. Before each micro-batch the model is set to ranks drawn by ``RankSampler`` from the seed and the step. The
    examples of an update, their order and (per example) their ranks do not depend on how the update is split into
    micro-batches and processes, nor do the loss and the gradient: every example weighs 1/n in an update of n.

    Evaluation. One pass over the data gives the logits of every rank, (batch, ranks, classes). ``compute_metrics`` is
    called once per rank, unchanged, and reported as ``eval_r1_accuracy`` .. ``eval_r8_accuracy``, their mean
    ``eval_mean_accuracy`` and the area under the rank-quality curve ``eval_aurac_accuracy``; ``eval_loss`` is the mean
    over ranks. Without ``compute_metrics`` the losses alone are reported. Predictions come in the data's order.

    Checkpoints hold the adapter and the modules to save, in PEFT's format.

    Args (beside Trainer's):
        rank_sampling: "example" (each example its own rank), "step" (one for an update, as in the paper), "matryoshka"
            (a fixed gate: see ``set_matryoshka_gate``), "fixed" (always r_max: plain LoRA).
        rank_distribution, r_min: how ranks are drawn, see ``RankSampler``. Default: "mixed" where the components were ordered
            before, each example has its own rank and nothing is frozen; "uniform" elsewhere.
        full_rank_share: of the updates, 0 to below 1, the first so many train all components together, as plain LoRA
            does; then ``order_components`` sorts them and ranks are drawn. Default 0.5 where ranks are drawn and all layers
            have ``scaling="alpha/r"``, else 0, the paper's way: components are ordered at one strength, and with another rule
            the lower ranks would run at a strength they were not ordered for. Measured in results/study.
        frozen: train component b alone (paper, eq. 10), and move no other.
        matryoshka_reduce: "sum" (default) or "mean" of the gates.
        eval_ranks: the ranks to measure, default 1..r_max.
        group_by_length: put examples of like length into an update (default), or shuffle only.
        adapter_facts: what to add to ``dylora.json`` beside a saved adapter.

    Raises ValueError for settings that contradict each other.
    """

    def __init__(
        self,
        *args,
        rank_sampling: str = "example",
        rank_distribution: str | None = None,
        r_min: int = 1,
        full_rank_share: float | None = None,
        frozen: bool = False,
        matryoshka_reduce: str | None = None,
        eval_ranks: list[int] | None = None,
        group_by_length: bool = True,
        adapter_facts: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if rank_sampling not in SAMPLINGS:
            raise ValueError(f"rank_sampling is {rank_sampling!r}; choose one of {', '.join(map(repr, SAMPLINGS))}.")
        draws = rank_sampling in DRAWN
        if frozen and not draws:
            raise ValueError(f"frozen training needs drawn ranks; rank_sampling={rank_sampling!r} draws none.")
        idle = {
            "rank_distribution": rank_distribution is not None and not draws,
            "r_min": r_min != 1 and rank_sampling == "fixed",
            "matryoshka_reduce": matryoshka_reduce is not None and rank_sampling != "matryoshka",
        }
        for name, given in idle.items():
            if given:
                raise ValueError(f"{name} has no effect with rank_sampling={rank_sampling!r}; leave it out.")
        adapted = has_lora(self.model)
        if full_rank_share is None:
            one_strength = adapted and all(layer.scaling == "alpha/r" for _, layer in lora_layers(self.model))
            full_rank_share = FULL_RANK_SHARE if draws and one_strength else 0.0
        if not 0 <= full_rank_share < 1 or (full_rank_share and not draws):
            raise ValueError(
                f"full_rank_share is {full_rank_share} with rank_sampling={rank_sampling!r}; give 0 to below 1, and 0 "
                f"where no ranks are drawn."
            )
        if full_rank_share and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("DeepSpeed and FSDP keep no whole factors to order; give full_rank_share=0 there.")
        if rank_distribution is None:
            mixed = rank_sampling == "example" and full_rank_share and not frozen
            rank_distribution = "mixed" if mixed else "uniform"
        if frozen and rank_distribution == "mixed":
            raise ValueError(
                "frozen training updates one drawn rank; rank_distribution='mixed' trains several at once."
            )
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
        self.rank_sampling, self.frozen, self.matryoshka_reduce = rank_sampling, frozen, matryoshka_reduce or "sum"
        self.full_rank_share, self._ordered = full_rank_share, False
        self.group_by_length, self.adapter_facts = group_by_length, adapter_facts or {}
        self.eval_ranks, self.rank_sampler, self.r_min = [], None, r_min
        if adapted:
            r_max = max_rank(self.model)
            self.eval_ranks = sorted({check_rank(b, r_max) for b in eval_ranks or range(1, r_max + 1)})
            per = rank_sampling if rank_sampling == "step" else "example"
            self.rank_sampler = RankSampler(r_max, r_min, rank_distribution, per=per, seed=self.args.seed)
        # Trainer takes a forward with **kwargs for one that divides its loss by num_items_in_batch; few do.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and _loss_uses_num_items(self.model)
        self.loss_is_scaled_for_ga = True  # compute_loss below weighs every micro-batch
        self.task_metrics, self.compute_metrics = self.compute_metrics, self._metrics_of_all_ranks
        self._batches: GroupedBatches | None = None
        self._iterator, self._update, self._micro, self._micro_batches = None, 0, 0, 1
        self._eval_order, self._loss_only, self._new_batch = None, False, lambda *batches: None
        self._frozen_by = None  # the optimizer that freeze_undrawn watches

    # --- batches --------------------------------------------------------------------------------------

    def _lengths(self, dataset) -> list[int]:
        """Tokens per example (all 1 where they cannot be told, which leaves the order to the shuffle)."""
        columns = getattr(dataset, "column_names", None)
        if columns is not None and self.args.length_column_name in columns:
            return list(dataset[self.args.length_column_name])
        if columns is not None and "input_ids" in columns:
            return [len(ids) for ids in dataset["input_ids"]]
        if columns is None and len(dataset) and isinstance(dataset[0], dict) and "input_ids" in dataset[0]:
            return [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
        return [1] * len(dataset)

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        self._batches = None
        if self.train_dataset is None or not has_length(self.train_dataset):
            return super().get_train_dataloader()
        # Trainer's own loader settings (collator, removed columns, workers), with our batches in place of a sampler.
        strategy = args.train_sampling_strategy
        grouped = strategy == "group_by_length" or (strategy == "random" and self.group_by_length)
        lengths = self._lengths(self.train_dataset) if grouped else [1] * len(self.train_dataset)
        self._batches = GroupedBatches(
            lengths,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )
        if not len(self._batches):
            raise ValueError(
                f"The training set has {len(lengths)} examples, fewer than one update of {self._batches.global_batch}; "
                f"leave out --dataloader_drop_last or use a smaller batch."
            )
        is_hf_dataset = hasattr(self.train_dataset, "column_names")
        dataset, collator = self.train_dataset, self.data_collator
        if is_hf_dataset:
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # The batches are this process's own already: nothing is left for accelerate to share out.
        return prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )

    def batches(self) -> GroupedBatches:
        """The micro-batches (lists of indices) that training used last."""
        return self._batches

    def _get_eval_sampler(self, eval_dataset):
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        return ByLength(self._lengths(eval_dataset))

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """Trainer's; but --dataloader_drop_last, which is about training, drops nothing that is to be measured."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if epoch_iterator is not self._iterator:
            skipped = self._batches is not None and not self.args.ignore_data_skip
            self._iterator, self._update = epoch_iterator, self.state.global_step if skipped else 0
        else:
            self._update += 1
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro, self._micro_batches = -1, len(samples)
        return samples, items

    # --- training -------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As Trainer's; afterwards the model runs at r_max."""
        self._ordered = False  # a checkpoint to go on from may know better
        try:
            with self._savings():
                return super().train(*args, **kwargs)
        finally:
            if self.rank_sampler is not None:
                set_rank(self.model, self.rank_sampler.r_max)

    def end(self):
        """As Trainer's, but the process group's threads end now: the wrapper around the model would keep it alive until
        the interpreter is torn down, where gloo's threads abort the process now and then."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        super().end()
        gc.collect()

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._micro += 1
        if self.rank_sampler is not None:
            self._set_training_ranks(_batch_size(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def _places(self) -> range | None:
        """Where this micro-batch's examples stand in the update; None where the data has no length."""
        if self._batches is None:
            return None
        return self._batches.places(self._update % self._batches.updates(), self._micro)

    def _set_training_ranks(self, batch_size: int) -> None:
        step, places = self.state.global_step, self._places()
        full_steps = min(round(self.full_rank_share * self.state.max_steps), self.state.max_steps - 1)
        self.rank_sampler.full_steps = full_steps
        frozen = self.frozen and step >= full_steps
        if full_steps and step >= full_steps and not self._ordered:
            order_components(self.model, self.optimizer)
            self._ordered = True
        if self.rank_sampling == "fixed":
            set_rank(self.model, self.rank_sampler.r_max)
        elif self.rank_sampling == "matryoshka":
            set_matryoshka_gate(self.model, self.rank_sampler.ranks, self.matryoshka_reduce)
        elif self.rank_sampling == "step":
            set_rank(self.model, self.rank_sampler(step, batch_size), frozen)
        elif places is None:
            ranks = self.rank_sampler(step, batch_size, self._micro, self.args.process_index)
            set_rank(self.model, ranks, frozen)
        else:
            # Drawn for the whole update and cut: an example's rank does not depend on how the update is split.
            ranks = self.rank_sampler(step, self._batches.update_size(self._update % self._batches.updates()))
            set_rank(self.model, ranks[list(places) or [0]], frozen)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss * self._weight()
        return (loss, outputs) if return_outputs else loss

    def _weight(self) -> float:
        """What makes the sum of the micro-batches' mean losses, averaged over processes, the update's mean loss."""
        places = self._places()
        if places is not None and not len(places):
            return 0.0
        if self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return 1.0  # scaled by num_items_in_batch
        if places is None:
            return 1 / self._micro_batches
        size = self._batches.update_size(self._update % self._batches.updates())
        return len(places) * self.args.world_size / size

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.frozen and self._frozen_by is not optimizer:
            freeze_undrawn(optimizer, self.model)
            self._frozen_by = optimizer
        return optimizer

    # --- evaluation -----------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Logits (batch, ranks, ...) of every rank in ``eval_ranks``; the losses come from them at the end.

        Where losses alone are wanted they take the logits' place, (batch, ranks), so that they are gathered alike.
        """
        if not self.eval_ranks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        size = _batch_size(inputs)
        # A model trained with a rank per example takes them in evaluation too; a pass of one rank alone gives its loss.
        plan = passes(inputs, self.eval_ranks, self.rank_sampling == "example" and not self._loss_only)
        self._new_batch(*(own for _, _, own in plan))
        outputs, labels = [], None
        for ranks, rank, own in plan:
            with use_rank(self.model, rank):
                loss, logits, labels = super().prediction_step(model, own, self._loss_only, ignore_keys)
            output = loss.expand(size) if self._loss_only else _first(logits)
            if output.ndim > 2:
                raise ValueError(
                    f"The logits have shape {tuple(output.shape)}; ranks are scored on one prediction an example, "
                    f"(batch, classes). Leave out compute_metrics to have every rank's loss."
                )
            outputs += output.chunk(len(ranks))
        if self._loss_only:
            labels = torch.zeros(size, device=outputs[0].device)
        return None, torch.stack(outputs, dim=1), None if labels is None else nested_truncate(labels, size)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, *args, **kwargs):
        self._loss_only = bool(self.eval_ranks) and description == "Evaluation" and (
            self.task_metrics is None or self.args.prediction_loss_only
        )  # fmt: skip
        self._eval_order = _length_order(dataloader)
        only = self.task_metrics is None and not self.eval_ranks and description == "Evaluation"
        # A data loader draws a seed from the global generator; training must not depend on when it is evaluated.
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self.eval_ranks:
                stack.callback(setattr, self, "_new_batch", self._new_batch)
                self._new_batch = stack.enter_context(share_between_ranks(self.model))
                stack.enter_context(self._savings())
            output = super().evaluation_loop(dataloader, description, only or None, *args, **kwargs)
        return output._replace(
            predictions=self._in_order(output.predictions), label_ids=self._in_order(output.label_ids)
        )

    @contextlib.contextmanager
    def _savings(self):
        """What gives the same for less while the model is trained or measured.

        The model's own context in which its last block computes what the classifier reads, if it has one; and frozen
        weights in autocast's precision (see ``frozen_weights_in``), unless something else looks after the weights.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(self.accelerator.mixed_precision))
        others = (
            self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.bf16_full_eval or self.args.fp16_full_eval
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(getattr(self.model, "first_token_only", contextlib.nullcontext)())
            if dtype and self.rank_sampler is not None and not others:
                stack.enter_context(frozen_weights_in(self.model, dtype))
            yield

    def _in_order(self, values):
        """Put what was computed from the longest to the shortest example back into the data's order."""
        if self._eval_order is None or values is None:
            return values
        if isinstance(values, (tuple, list)):
            return type(values)(self._in_order(value) for value in values)
        back = np.empty_like(values)
        back[self._eval_order[: len(values)]] = values
        return back

    def _metrics_of_all_ranks(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = (self._in_order(v) for v in (prediction.predictions, prediction.label_ids))
        if not self.eval_ranks:
            return self.task_metrics(EvalPrediction(predictions, labels))
        by_rank = []
        for k in range(len(self.eval_ranks)):
            if self._loss_only:
                by_rank.append({"loss": float(predictions[:, k].mean())})
                continue
            scores = dict(self.task_metrics(EvalPrediction(predictions[:, k], labels))) if self.task_metrics else {}
            loss = mean_loss(predictions[:, k], labels)
            by_rank.append(scores | ({} if loss is None else {"loss": loss}))
        metrics = {
            f"r{b}_{key}": v for b, scores in zip(self.eval_ranks, by_rank, strict=True) for key, v in scores.items()
        }
        for key in by_rank[0]:
            curve = [scores[key] for scores in by_rank]
            mean = float(np.mean(curve))
            metrics |= (
                {"loss": mean}
                if key == "loss"
                else {f"mean_{key}": mean, f"aurac_{key}": aurac(self.eval_ranks, curve)}
            )
        return metrics

    # --- checkpoints ----------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        if self.rank_sampler is None:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:  # every process comes here, one writes
            return None
        output_dir = Path(output_dir or self.args.output_dir)
        facts = self.training_facts() | {"ordered": self._ordered}
        save_adapter(self.model, output_dir, extra=facts | self.adapter_facts)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, output_dir / "training_args.bin")

    def training_facts(self) -> dict:
        """How ranks are drawn and trained, as ``dylora.json`` and ``rank_results.json`` tell it."""
        return {
            "sampling": self.rank_sampling,
            "distribution": self.rank_sampler.distribution if self.rank_sampling in DRAWN else None,
            "r_min": self.r_min,
            "full_rank_share": self.full_rank_share,
            "frozen": self.frozen,
        }

    def create_model_card(self, *args, **kwargs):
        """loralib's card (see ``loralib.card``) for an adapter, unless a script has written a fuller one; else Trainer's."""
        if self.rank_sampler is None:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and not (Path(self.args.output_dir) / "README.md").exists():
            self.write_model_card()

    def write_model_card(self, results: dict | None = None) -> None:
        """Write README.md beside the saved adapter; ``results`` is the content of rank_results.json."""
        name = getattr(self, "hub_model_id", None) or self.args.output_dir
        write_text(
            Path(self.args.output_dir) / "README.md", model_card(*read_configs(self.args.output_dir), results, name)
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.rank_sampler is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_adapter(self.model, resume_from_checkpoint)
        self._ordered = read_facts(resume_from_checkpoint).get("ordered", False)

    def _load_best_model(self):
        if self.rank_sampler is None:
            return super()._load_best_model()
        best = self.state.best_model_checkpoint
        load_adapter(self.model, best)
        # A checkpoint of the first part of the training has its components as they came.
        if self.full_rank_share and not read_facts(best).get("ordered"):
            order_components(self.model)


def mean_loss(logits: np.ndarray, labels) -> float | None:
    """The mean loss of a classifier (cross-entropy) or of a regression with one output (squared error), from its logits.

    None where the shapes are neither's.
    """
    if labels is None or logits.ndim != 2 or np.ndim(labels) != 1:
        return None
    logits, labels = torch.as_tensor(logits).float(), torch.as_tensor(labels)
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.float()).item()
    return F.cross_entropy(logits, labels.long()).item()


def _first(logits):
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def _batch_size(inputs) -> int:
    return next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)


def _length_order(dataloader) -> list[int] | None:
    """The order of the ``ByLength`` sampler within a data loader, however accelerate wrapped it."""
    inner = dataloader
    while inner is not None and not isinstance(inner, ByLength):
        inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)
    return None if inner is None else inner.order


def _loss_uses_num_items(model: nn.Module) -> bool:
    """Whether the model's forward hands its keyword arguments to transformers' ``loss_function``, which divides by them."""
    try:
        return "self.loss_function(" in inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return False
