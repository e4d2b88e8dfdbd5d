"""Which examples make which micro-batch: one order, a pure function of seed and epoch, for every split of the work.

An *update* is what one optimizer step sees: ``global_batch`` examples. It is cut into cells, one per micro-batch and
process; cell c of C takes examples c*n//C .. (c+1)*n//C of the update's n. So the same examples meet in the same update
at the same place whatever the micro-batch size and the number of processes, and a resumed run sees what it would have.
"""

import math

import torch
from torch.utils.data import Sampler

# Sorting by length happens within blocks of at least so many examples and so many updates: larger blocks pad less and mix
# less. With these, padding is under 5 percent of the tokens on RTE and CoLA at 32 examples a batch.
BLOCK_EXAMPLES, BLOCK_UPDATES = 2560, 50


def cell(n: int, cells: int, c: int) -> range:
    """The places, within an update of n examples, of the examples in cell c."""
    return range(c * n // cells, (c + 1) * n // cells)


def epoch_order(lengths: list[int], global_batch: int, seed: int, epoch: int) -> list[int]:
    """All indices in the order of an epoch: shuffled, then grouped so that an update has examples of like length.

    Shuffled indices are sorted by length within blocks, cut into updates, and the updates shuffled. The last,
    incomplete update stays last.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(order) // global_batch * global_batch
    rest, order = order[whole:], order[:whole]
    size = global_batch * max(BLOCK_UPDATES, -(-BLOCK_EXAMPLES // global_batch))
    updates = []
    for start in range(0, whole, size):
        block = sorted(order[start : start + size], key=lambda i: lengths[i])
        updates += [block[i : i + global_batch] for i in range(0, len(block), global_batch)]
    shuffled = [updates[i] for i in torch.randperm(len(updates), generator=generator).tolist()]
    return [i for update in shuffled for i in update] + sorted(rest, key=lambda i: lengths[i])


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
