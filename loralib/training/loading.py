"""The part of the trainer that loads data: exact batches for training, the longest first for evaluation."""

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import has_length

from .batching import ByLength, GroupedBatches, Place, lengths_of
from .part import TrainerPart

# Settings of Trainer's own training loader that go over to the one with our batches.
LOADER_SETTINGS = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class ExactBatches(TrainerPart):
    """Of ``DyLoRAMixin``: examples, order and place in the update do not depend on how an update is split.

    A class before or after that has a sampler or a training loader of its own keeps it: what it gives is taken as a
    stream, micro-batch by micro-batch.
    """

    place: Place
    group_by_length: bool

    def _refuse_generated(self) -> None:
        """Raise ValueError before a trainer that generates its examples, whose micro-batches are no rows of its
        data."""
        for kind in type(self).__mro__:
            if {"get_train_dataloader", "_prepare_inputs"} <= vars(kind).keys() and kind is not Trainer:
                raise ValueError(
                    f"{kind.__name__} makes what it trains on, which cannot run at a rank per example: train with "
                    f"{kind.__name__} itself, then call loralib.order_components(model), so that lower ranks are "
                    "the best parts of it."
                )

    def _own(self, name: str) -> list[type]:
        """The classes, beside Trainer and this one, that say ``name``."""
        return [kind for kind in type(self).__mro__ if name in vars(kind) and kind not in (Trainer, ExactBatches)]

    def batches(self) -> GroupedBatches | None:
        """The micro-batches (lists of indices) that training used last."""
        return self.place.batches

    def _check_enough(self) -> None:
        """Raise ValueError if --dataloader_drop_last leaves nothing to train on."""
        args, data = self.args, self.train_dataset
        update = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        if args.dataloader_drop_last and data is not None and has_length(data) and len(data) < update:
            raise ValueError(
                f"The training set has {len(data)} examples, fewer than one update of {update}; leave out "
                f"--dataloader_drop_last or use a smaller batch."
            )

    def _get_train_sampler(self, train_dataset=None):
        """A stand-in that draws nothing: ``get_train_dataloader`` puts our batches in its place."""
        if self._own("_get_train_sampler"):
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if has_length(dataset) else None

    def _get_eval_sampler(self, eval_dataset):
        if self._own("_get_eval_sampler"):
            return super()._get_eval_sampler(eval_dataset)
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        return ByLength(self._lengths(eval_dataset))

    def _lengths(self, dataset) -> list[int]:
        """Of a data set's examples; of sound where grouping by length is asked for, since it is read for that."""
        asked = self.args.train_sampling_strategy == "group_by_length"
        first, *_ = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]  # as Trainer does
        return lengths_of(dataset, self.args.length_column_name, first if asked else "input_ids")

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """Trainer's; but --dataloader_drop_last, which is about training, drops nothing that is to be measured."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's loader with all its settings, and our batches in place of its sampler."""
        args, loader = self.args, super().get_train_dataloader()
        self.place.begin()
        behind = type(self).__mro__[type(self).__mro__.index(ExactBatches) :]
        if self._own("_get_train_sampler") or set(behind) & {*self._own("get_train_dataloader")}:
            return loader
        if not has_length(self.train_dataset) or isinstance(self.train_dataset, IterableDataset):
            return loader
        strategy = args.train_sampling_strategy
        grouped = strategy == "group_by_length" or (strategy == "random" and self.group_by_length)
        size = len(self.train_dataset)
        batches = GroupedBatches(
            self._lengths(self.train_dataset) if grouped else [1] * size,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
            args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )
        self.place.batches = batches
        settings = {name: getattr(loader, name) for name in LOADER_SETTINGS}
        loader = DataLoader(loader.dataset, batch_sampler=batches, **settings)
        # The batches are this process's own already: nothing is left for accelerate to share out.
        return prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        skipped = self.place.batches is not None and not self.args.ignore_data_skip
        self.place.begin_update(epoch_iterator, len(samples), self.state.global_step if skipped else 0)
        return samples, items
