import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from loralib import RankSampler


@pytest.mark.parametrize("distribution", ["uniform", "geometric"])
@pytest.mark.parametrize("r_min", [1, 3])
@pytest.mark.parametrize("per", ["example", "step"])
def test_the_distribution(distribution, r_min, per):
    sampler = RankSampler(8, r_min, distribution, p=0.15, per=per, seed=5)
    weights = [1.0 if distribution == "uniform" else 0.85 ** (b - r_min) for b in range(r_min, 9)]
    if per == "step":
        draws = torch.tensor([sampler(step, 4) for step in range(8000)])
    else:
        draws = torch.cat([sampler(step, 400) for step in range(20)])
    counts = torch.bincount(draws, minlength=9)
    assert counts[:r_min].sum() == 0
    expected = [w / sum(weights) * len(draws) for w in weights]
    assert chisquare(counts[r_min:].numpy(), expected).pvalue > 1e-3
    assert sampler.probabilities() == pytest.approx([w / sum(weights) for w in weights])


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(0, 8), st.integers(0, 8), st.integers(0, 100))
def test_it_is_a_pure_function_of_seed_and_arguments(step, batch_size, micro_step, process, seed):
    one, other = RankSampler(8, seed=seed), RankSampler(8, seed=seed)
    other(step + 1, 3)  # what was drawn before does not matter
    assert torch.equal(one(step, batch_size, micro_step, process), other(step, batch_size, micro_step, process))
    per_step = RankSampler(8, per="step", seed=seed)
    assert per_step(step, batch_size, micro_step, process) == per_step(step, 1)


def test_the_global_generators_are_left_alone():
    before = torch.get_rng_state()
    RankSampler(8)(0, 100)
    assert torch.equal(before, torch.get_rng_state())


def test_steps_micro_steps_processes_and_seeds_differ():
    sampler = RankSampler(8)
    draws = [sampler(0, 64), sampler(1, 64), sampler(0, 64, 1), sampler(0, 64, 0, 1), RankSampler(8, seed=1)(0, 64)]
    assert len({tuple(d.tolist()) for d in draws}) == 5


@given(st.integers(1, 12), st.data(), st.integers(1, 64), st.integers(0, 1000))
def test_mixed_gives_a_third_the_lowest_rank_and_the_others_equal_parts_of_the_ladder(r_max, data, n, step):
    r_min = data.draw(st.integers(1, r_max))
    sampler = RankSampler(r_max, r_min, "mixed", seed=4)
    weights = sampler(step, n)
    assert weights.shape == (n, r_max) and torch.allclose(weights.sum(1), torch.ones(n))
    assert torch.equal(weights, sampler(step, n))
    ladder = [b for b in range(1, r_max + 1) if b == r_max or any(b == r_min * 2**k for k in range(4))]
    lowest = 0
    for row in weights.tolist():
        trained = [b for b in range(1, r_max + 1) if row[b - 1]]
        lowest += trained == [r_min] and len(ladder) > 1
        assert trained in ([r_min], ladder) and len({row[b - 1] for b in trained}) == 1
    assert len(ladder) == 1 or abs(lowest - n / 3) < 1


@given(st.integers(1, 70), st.data(), st.integers(1, 64), st.integers(0, 1000))
def test_halving_gives_half_to_the_highest_and_half_of_the_rest_to_each_rank_up(r_max, data, n, step):
    r_min = data.draw(st.integers(1, r_max))
    sampler = RankSampler(r_max, r_min, "halving", seed=4)
    left, wanted = 1.0, {r_max: 1.0}
    lower = [r_min * 2**k for k in range(7) if r_min * 2**k < r_max]
    for b in [r_max, *lower] if lower else []:
        wanted[b] = left = left / 2
    if lower:
        wanted[lower[-1]] += left  # shares sum to 1
    assert dict(zip(sampler.ranks, sampler.probabilities(), strict=True)) == {
        b: wanted.get(b, 0) for b in sampler.ranks
    }
    ranks = sampler(step, n).tolist()
    assert ranks == sampler(step, n).tolist() and len(ranks) == n
    assert all(abs(ranks.count(b) - n * wanted.get(b, 0)) < 1 for b in sampler.ranks)


def test_halving_puts_ranks_at_random_places_and_draws_one_for_an_update():
    sampler = RankSampler(8, distribution="halving")
    draws = torch.stack([sampler(step, 8) for step in range(400)])
    assert ((draws == 8).float().mean(0) - 1 / 2).abs().max() < 0.1
    assert ((draws == 1).float().mean(0) - 1 / 4).abs().max() < 0.1
    of_updates = [RankSampler(8, distribution="halving", per="step")(step, 8) for step in range(2000)]
    assert {b: of_updates.count(b) / 2000 for b in set(of_updates)} == pytest.approx(
        {8: 1 / 2, 1: 1 / 4, 2: 1 / 8, 4: 1 / 8}, abs=0.05
    )


def test_mixed_parts_in_training_are_its_probabilities():
    sampler = RankSampler(8, distribution="mixed")
    parts = torch.cat([sampler(step, 30) for step in range(20)]).mean(0).tolist()
    assert parts == pytest.approx([1 / 2, 1 / 6, 0, 1 / 6, 0, 0, 0, 1 / 6])
    assert sampler.probabilities() == pytest.approx(parts)


@pytest.mark.parametrize(
    "options",
    [
        {"r_min": 0},
        {"r_min": 9},
        {"distribution": "zipf"},
        {"distribution": "mixed", "per": "step"},
        {"p": 1.0},
        {"per": "batch"},
    ],
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError):
        RankSampler(8, **options)
