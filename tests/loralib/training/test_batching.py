import random

from hypothesis import given
from hypothesis import strategies as st

from loralib.training.batching import ByLength, GroupedBatches, epoch_order

sizes = st.integers(1, 300)
lengths = st.lists(st.integers(1, 60), min_size=1, max_size=300)
splits = st.sampled_from([(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 1, 8)])


def updates(lengths, split, epoch, **options):
    """The examples of each update, by place, joined over micro-batches and processes."""
    batch, accumulation, processes = split
    found = []
    samplers = [GroupedBatches(lengths, batch, accumulation, processes, p, seed=3, **options) for p in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    streams = [iter(sampler) for sampler in samplers]
    for update in range(samplers[0].updates()):
        joined = {}
        for micro in range(samplers[0].micro_batches(update)):
            for sampler, stream in zip(samplers, streams, strict=True):
                indices = next(stream)
                places = sampler.places(update, micro)
                assert len(indices) == max(len(places), 1) <= batch
                joined |= dict(zip(places, indices, strict=False))
        found.append([joined[place] for place in sorted(joined)])
    assert all(next(stream, None) is None for stream in streams)
    return found


@given(lengths, splits, st.integers(0, 5))
def test_every_split_of_the_work_sees_the_same_updates(lengths, split, epoch):
    found = updates(lengths, split, epoch)
    assert found == updates(lengths, (8, 1, 1), epoch)
    assert sorted(i for update in found for i in update) == list(range(len(lengths)))


@given(lengths, splits)
def test_the_number_of_batches(lengths, split):
    batch, accumulation, processes = split
    samplers = [GroupedBatches(lengths, batch, accumulation, processes, p) for p in range(processes)]
    assert {len(s) for s in samplers} == {len(list(s)) for s in samplers}
    dropping = GroupedBatches(lengths, batch, accumulation, processes, drop_last=True)
    assert len(dropping) == len(list(dropping)) == len(lengths) // 8 * accumulation


@given(lengths, st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_an_epochs_order_is_a_pure_function(lengths, batch, seed, epoch):
    order = epoch_order(lengths, batch, seed, epoch)
    assert order == epoch_order(lengths, batch, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))


def test_epochs_and_seeds_differ_and_lengths_are_grouped():
    lengths = [i % 50 + 1 for i in range(1000)]
    orders = {tuple(epoch_order(lengths, 10, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    order = orders.pop()
    spread = [max(b) - min(b) for b in ([lengths[i] for i in order[k : k + 10]] for k in range(0, 1000, 10))]
    assert sum(spread) / len(spread) < 5  # at random it would be about 41


def test_sorting_goes_as_far_as_padding_needs_and_no_further():
    generator = random.Random(0)
    skewed = [int(generator.lognormvariate(4, 0.6)) + 5 for _ in range(3000)]
    order = epoch_order(skewed, 32, 0, 0)[: 3000 // 32 * 32]
    batches = [[skewed[i] for i in order[k : k + 32]] for k in range(0, len(order), 32)]
    padding = 1 - sum(map(sum, batches)) / sum(len(b) * max(b) for b in batches)
    assert padding < 0.05
    even = [10] * 3000  # nothing to gain: the order is a plain shuffle, with no two updates sorted together
    order = epoch_order(even, 32, 0, 0)
    assert sorted(order) == list(range(3000)) and order != sorted(order)


def test_sequential_order_on_request():
    assert updates([3, 1, 2] * 5, (4, 1, 1), 0, shuffle=False) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14],
    ]


def test_by_length_goes_from_the_longest_to_the_shortest():
    assert list(ByLength([2, 9, 5])) == [1, 2, 0]
