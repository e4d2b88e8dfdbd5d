"""Which examples make which micro-batch: one order, a pure function of seed and epoch, for every split of the work.

An *update* is what one optimizer step sees: ``global_batch`` examples. It is cut into cells, one per micro-batch and
process; cell c of C takes examples c*n//C .. (c+1)*n//C of the update's n. So the same examples meet in the same update
at the same place whatever the micro-batch size and the number of processes, and a resumed run sees what it would have.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

PADDING = 0.045  # the share of padding that sorting aims below, at micro-batches of up to 32 examples
MICRO = 32


def cell(n: int, cells: int, c: int) -> range:
    """The places, within an update of n examples, of the examples in cell c."""
    return range(c * n // cells, (c + 1) * n // cells)


def epoch_order(lengths: list[int], global_batch: int, seed: int, epoch: int) -> list[int]:
    """All indices in the order of an epoch: shuffled, then grouped so that an update has examples of like length.

    Shuffled indices are sorted by length within blocks of some updates, cut into updates, and the updates shuffled.
    Sorting costs mixing, so the blocks are the smallest (1, 2, 4, .. updates) that keep padding under ``PADDING``. The
    last, incomplete update stays last.
    """
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator, device="cpu")
    whole = len(order) // global_batch * global_batch
    sizes = torch.as_tensor(lengths)
    rest, order = order[whole:], order[:whole]
    updates = whole // global_batch
    block = 1
    grouped = _sorted_in_blocks(order, sizes, block * global_batch)
    while block < updates and _padding(sizes[grouped]) > PADDING:
        block *= 2
        grouped = _sorted_in_blocks(order, sizes, block * global_batch)
    grouped = grouped.view(updates, global_batch)[torch.randperm(updates, generator=generator, device="cpu")].flatten()
    return [*grouped.tolist(), *rest[sizes[rest].argsort(stable=True)].tolist()]


def _sorted_in_blocks(order: torch.Tensor, sizes: torch.Tensor, block: int) -> torch.Tensor:
    if not len(order):
        return order
    return torch.cat([part[sizes[part].argsort(stable=True)] for part in order.split(block)])


def _padding(sizes: torch.Tensor) -> float:
    """The share of padding in consecutive micro-batches of ``MICRO`` examples of these sizes."""
    padded = sum(len(part) * int(part.max()) for part in sizes.split(MICRO))
    return 1 - float(sizes.sum()) / padded if padded else 0.0


class GroupedBatches(Sampler[list[int]]):
    """The micro-batches of one process, epoch after epoch (``set_epoch``), as lists of indices.

    Every process gets the same number of micro-batches. Where the last update has fewer examples than cells, an empty
    cell is given one example of weight 0 (``weight``), so that processes stay in step.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        self.lengths, self.batch_size, self.accumulation = lengths, batch_size, accumulation
        self.processes, self.process, self.seed, self.shuffle = processes, process, seed, shuffle
        self.global_batch, self.epoch = batch_size * accumulation * processes, 0
        self.size = len(lengths) // self.global_batch * self.global_batch if drop_last else len(lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def updates(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(self.size / self.global_batch)

    def update_size(self, update: int) -> int:
        """How many examples update number ``update`` of an epoch has, over all processes."""
        return min(self.global_batch, self.size - update * self.global_batch)

    def micro_batches(self, update: int) -> int:
        return math.ceil(self.update_size(update) / (self.batch_size * self.processes))

    def places(self, update: int, micro: int) -> range:
        """The places within the update of this process's examples in micro-batch ``micro``; may be empty."""
        cells = self.micro_batches(update) * self.processes
        return cell(self.update_size(update), cells, micro * self.processes + self.process)

    def __len__(self) -> int:
        return (self.updates() - 1) * self.accumulation + self.micro_batches(self.updates() - 1) if self.size else 0

    def __iter__(self):
        order = range(len(self.lengths))
        if self.shuffle:
            order = epoch_order(self.lengths, self.global_batch, self.seed, self.epoch)
        for update in range(self.updates()):
            start = update * self.global_batch
            for micro in range(self.micro_batches(update)):
                indices = [order[start + place] for place in self.places(update, micro)]
                yield indices or [order[start]]


class ByLength(Sampler[int]):
    """Indices from the longest to the shortest: evaluation pads little, and a batch too large fails at once."""

    def __init__(self, lengths):
        self.order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self):
        return iter(self.order)


def lengths_of(dataset, column: str = "length", inputs: str = "input_ids") -> list[int]:
    """Tokens of each example by its ``column``, else by its ``inputs``; all 1 where neither tells, which leaves the
    order to the shuffle. Raises ValueError for a column that holds no lengths, unless it is only called "length".

    Columns are read as they are stored, whatever format or transform a data set gives its examples.
    """
    stored = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    names = getattr(stored, "column_names", None)
    if names is not None:
        if column in names:
            sizes = [size.item() if hasattr(size, "item") else size for size in stored[column]]
            wrong = [size for size in sizes if not isinstance(size, int) or size < 0]
            if not wrong:
                return sizes
            if column != "length":
                raise ValueError(f"column {column!r} holds {wrong[0]!r}; lengths are whole numbers from 0 on.")
        if inputs in names:
            return [len(ids) for ids in stored[inputs]]
    elif len(dataset) and isinstance(dataset[0], Mapping) and inputs in dataset[0]:
        return [len(dataset[i][inputs]) for i in range(len(dataset))]
    return [1] * len(dataset)


def order_within(dataloader) -> list[int] | None:
    """The order of the ``ByLength`` sampler of a data loader, however accelerate wrapped it; None where it has
    another."""
    inner: Any = dataloader
    while inner is not None and not isinstance(inner, ByLength):
        outer = inner
        inner = getattr(outer, "batch_sampler", None)
        inner = getattr(outer, "sampler", None) if inner is None else inner
    return None if inner is None else inner.order


class Place:
    """Where training stands: the update of the epoch and the micro-batch of the update, and what follows from them.

    ``batches`` are the epoch's micro-batches, None for data without a length.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A training begins."""
        self.batches: GroupedBatches | None = None
        self.micro, self.micro_batches = 0, 1
        self._update = 0
        self._iterator: Iterator | None = None

    def begin_update(self, iterator: Iterator, micro_batches: int, first: int) -> None:
        """The next update begins. ``iterator`` is its epoch's; that of the training's first epoch begins with update
        number ``first``, where a resumed training skips what was seen."""
        if iterator is self._iterator:
            self._update += 1
        else:
            self._update = first if self._iterator is None else 0
        self._iterator, self.micro, self.micro_batches = iterator, -1, micro_batches

    def begin_micro_batch(self) -> None:
        self.micro += 1

    @property
    def update(self) -> int:
        """The update's number within its epoch."""
        assert self.batches is not None
        return self._update % self.batches.updates()

    def places(self) -> range | None:
        """Where the micro-batch's examples stand in the update; None for data without a length."""
        return None if self.batches is None else self.batches.places(self.update, self.micro)

    def size(self, micro_batch: int) -> int:
        """Examples in the update or, for data without a length, in the micro-batch, which has ``micro_batch``."""
        return micro_batch if self.batches is None else self.batches.update_size(self.update)

    def weight(self, processes: int) -> float:
        """What makes the sum of the micro-batches' mean losses, averaged over processes, the update's mean loss."""
        places = self.places()
        if places is None or self.batches is None:
            return 1 / self.micro_batches
        return len(places) * processes / self.batches.update_size(self.update)
