"""RankSchedule: its defaults, what a step sets, and that it refuses what makes no sense."""

import dataclasses
from collections import UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loralib as lora
from loralib.pacing import paces_of, usual_paces
from loralib.report.results import RankResults
from loralib.schedule import FACTS, RankSchedule
from loralib.titles import title_of


@pytest.mark.parametrize(
    ("options", "scaling", "share", "distribution", "paced"),
    [
        ({}, "alpha/r", 0.8, "mixed", False),
        ({}, "alpha/b", 0.0, "uniform", False),  # ordered at one strength, its lower ranks would run at another
        ({}, "several", 0.0, "uniform", False),
        ({"sampling": "step"}, "alpha/r", 0.8, "uniform", False),
        ({"frozen": True}, "alpha/r", 0.8, "uniform", False),
        ({"full_rank_share": 0.0}, "alpha/r", 0.0, "uniform", False),
        ({"full_rank_share": 0.0, "distribution": "halving"}, "alpha/r", 0.0, "halving", True),
        ({"full_rank_share": 0.5}, "alpha/b", 0.5, "mixed", False),
        ({"distribution": "halving"}, "alpha/b", 0.0, "halving", False),  # low ranks are stronger there as it is
        ({"distribution": "halving"}, "several", 0.0, "halving", False),
        ({"paced": False, "distribution": "halving"}, "alpha/r", 0.8, "halving", False),
        ({"distribution": "halving"}, "alpha/r", 0.8, "halving", True),
        ({"distribution": "mixed", "paced": True}, "alpha/b", 0.0, "mixed", True),
        ({"sampling": "fixed"}, "alpha/r", 0.0, None, False),
        ({"sampling": "matryoshka"}, "alpha/r", 0.0, None, False),
    ],
)
def test_defaults_are_settled_once(options, scaling, share, distribution, paced):
    settled = RankSchedule(**options).resolve(8, scaling).schedule
    assert (settled.full_rank_share, settled.distribution, settled.paced) == (share, distribution, paced)
    assert settled.resolve(8, "alpha/sqrt(b)").schedule == settled  # nothing is left to decide


def test_the_papers_way_is_one_word():
    paper = RankSchedule.paper().resolve(8, "alpha/b", 10)
    assert paper.facts() == {
        "sampling": "step", "distribution": "uniform", "r_min": 1, "full_rank_share": 0.0, "frozen": True,
        "paced": False,
    }  # fmt: skip
    sampler = lora.RankSampler(8, per="step")
    for step in range(10):
        setting = paper.setting(step, 4)
        assert setting.rank == sampler(step, 4) and setting.frozen and not setting.order
    assert not RankSchedule.paper(frozen=False).frozen


@given(
    st.sampled_from(["example", "step"]), st.integers(1, 12), st.integers(1, 40), st.floats(0, 0.99), st.integers(1, 9),
    st.integers(0, 3),
)  # fmt: skip
def test_all_components_first_then_ordered_once_then_ranks_are_drawn(sampling, r_max, steps, share, size, seed):
    bound = RankSchedule(sampling, "uniform", full_rank_share=share, seed=seed).resolve(r_max, "alpha/r", steps)
    first = min(round(share * steps), steps - 1)
    per = {"example": "example", "step": "step"}[sampling]
    sampler = lora.RankSampler(r_max, per=per, seed=seed)
    orders = []
    for step in range(steps):
        setting = bound.setting(step, size)
        drawn = torch.as_tensor(setting.rank)
        wanted = torch.as_tensor(sampler(step, size) if step >= first else r_max).expand_as(drawn)
        assert torch.equal(drawn, wanted) and drawn.shape == ((size,) if sampling == "example" else ())
        orders += [step] * setting.order
    assert orders == ([first] if share else [])


@given(st.integers(1, 30), st.data())
def test_ranks_of_an_update_do_not_depend_on_how_it_is_split(size, data):
    cut = data.draw(st.integers(0, size))
    bound = RankSchedule(full_rank_share=0.0, seed=3).resolve(5, "alpha/r", 9)
    whole = bound.setting(4, size, places=range(size)).rank
    parts = [bound.setting(4, size, micro_step=m, places=p).rank for m, p in enumerate((range(cut), range(cut, size)))]
    parts = [
        part for part, n in zip(parts, (cut, size - cut), strict=True) if n
    ]  # an empty part gets one rank to stay in step
    assert torch.equal(torch.cat(parts), whole)


def test_ordering_at_the_first_micro_batch_alone_unless_told_what_has_been():
    bound = RankSchedule(full_rank_share=0.5).resolve(4, "alpha/r", 10)
    assert [bound.setting(5, 2, micro_step=m).order for m in (0, 1)] == [True, False]
    assert bound.setting(7, 2, micro_step=1, ordered=False).order and not bound.setting(7, 2, ordered=True).order
    assert not bound.setting(4, 2, ordered=False).order


def test_a_fixed_gate_of_some_ranks():
    model = lora.inject(nn.Sequential(nn.Linear(3, 3)), ["0"], r=4, lora_alpha=4)
    RankSchedule("matryoshka", gate_ranks=(1, 4), reduce="mean").resolve(4, "alpha/r", 5).setting(2, 7).apply(model)
    assert model[0].state.gate.tolist() == [1.0, 0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="rank is 5"):
        RankSchedule("matryoshka", gate_ranks=(5,)).resolve(4)


def test_apply_orders_with_the_optimizer_and_sets_the_model():
    model = lora.inject(nn.Sequential(nn.Linear(6, 6)), ["0"], r=3)
    nn.init.normal_(model[0].lora_B)
    with lora.use_rank(model, 3):
        before = model(torch.eye(6))
    optimizer = torch.optim.AdamW(model.parameters())
    bound = RankSchedule(distribution="halving", full_rank_share=0.5).resolve(3, "alpha/r", 4)
    bound.setting(1, 6).apply(model, optimizer)
    assert paces_of(optimizer) == (1, 1, 1)
    bound.setting(2, 6).apply(model, optimizer)
    A = model[0].lora_A.detach()
    assert torch.allclose(A @ A.T, (A @ A.T).diagonal().diag(), atol=1e-5)
    assert sorted(lora.get_rank(model).tolist())[3:] == [3, 3, 3] and paces_of(optimizer) == (3, 1.5, 1)
    with lora.use_rank(model, 3):
        assert torch.allclose(model(torch.eye(6)), before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, "sampling is 'random'; choose one of 'example', 'step', 'matryoshka', 'fixed'"),
        ({"distribution": "zipf"}, "distribution is 'zipf'"),
        ({"reduce": "max"}, "reduce is 'max'"),
        ({"sampling": "fixed", "frozen": True}, "frozen training needs drawn ranks"),
        ({"full_rank_share": 1.0}, "full_rank_share is 1.0"),
        ({"full_rank_share": float("nan")}, "full_rank_share is nan"),
        ({"sampling": "fixed", "full_rank_share": 0.5}, "full_rank_share is 0.5"),
        ({"sampling": "fixed", "distribution": "uniform"}, "distribution has no effect"),
        ({"sampling": "fixed", "r_min": 2}, "r_min has no effect"),
        ({"reduce": "mean"}, "reduce has no effect"),
        ({"sampling": "fixed", "paced": True}, "paced has no effect"),
        ({"gate_ranks": (1,)}, "gate_ranks has no effect"),
        ({"gate_ranks": (), "sampling": "matryoshka"}, "gate_ranks is empty"),
        ({"full_rank_share": "0.5"}, "full_rank_share is '0.5'"),
        ({"distribution": "mixed", "sampling": "step"}, "goes with sampling='example'"),
        ({"distribution": "mixed", "frozen": True}, "not frozen"),
        ({"p": 1.0}, "p is 1.0"),
        ({"r_min": 0}, "r_min is 0"),
        ({"r_min": "1"}, "r_min is '1'"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        RankSchedule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [((8, 100), "scaling is 100"), ((8, "alpha/R"), "scaling is 'alpha/R'"), ((0,), "r_max is 0")],
)
def test_an_adapter_that_there_is_not(options, message):
    with pytest.raises(ValueError, match=message):
        RankSchedule().resolve(*options)


def test_batches_of_any_mapping_say_how_many_examples_they_have():
    model = lora.inject(nn.Sequential(nn.Linear(6, 6)), ["0"], r=4)
    batches = [UserDict({"label": torch.tensor(0), "x": torch.zeros(5, 6)}), [UserDict({"x": torch.zeros(2, 6)})]]
    schedule = RankSchedule(full_rank_share=0.0, distribution="uniform").resolve(4)
    assert [len(lora.get_rank(model)) for _ in schedule.over(batches, model)] == [5, 2]
    with pytest.raises(ValueError, match="A batch is dict without a tensor"):
        list(schedule.over([{"x": 3}], model))


def test_ranks_beyond_r_max_and_unknown_steps():
    with pytest.raises(ValueError, match="r_min is 9 and r_max 8"):
        RankSchedule(r_min=9).resolve(8)
    with pytest.raises(ValueError, match="no number of steps"):
        RankSchedule().resolve(8).setting(0, 1)


@pytest.mark.parametrize(
    ("schedule", "title"),
    [
        (RankSchedule(distribution="halving", full_rank_share=0.3),
         "DyLoRA, components ordered after 30 % of the steps, then rank 8 half of the time, else 1, 2 or 4, "
         "first components faster"),
        (RankSchedule(),
         "DyLoRA, components ordered after 80 % of the steps, then rank 1 or ranks 1, 2, 4 and 8 together"),
        (RankSchedule("step", "halving", paced=False, full_rank_share=0),
         "DyLoRA, a rank for each update, rank 8 half of the time, else 1, 2 or 4"),
        (RankSchedule.paper(), "DyLoRA, a rank for each update, one component updated (frozen)"),
        (RankSchedule("fixed"), "LoRA trained at rank 8"),
        (RankSchedule("matryoshka", reduce="mean"), "one fixed gate, the mean over all ranks"),
        (RankSchedule(distribution="geometric", full_rank_share=0.7),
         "DyLoRA, components ordered after 70 % of the steps, then a rank for each example, low ones more often"),
    ],
)  # fmt: skip
def test_titles_also_from_the_facts_alone(schedule, title):
    bound = schedule.resolve(8, "alpha/r")
    assert bound.title() == title == title_of(bound.facts(), 8)


def test_legends_call_the_default_by_the_name_alone():
    def legend(schedule):
        bound = schedule.resolve(8)
        facts = {name: value for name, value in bound.facts().items() if name in FACTS}
        return RankResults("task", bound.title(), "accuracy", {}, {}, max_rank=8, **facts).short_name()

    assert legend(RankSchedule()) == "DyLoRA"
    assert legend(RankSchedule(full_rank_share=0.5)) == "DyLoRA, ordered at 50 %"
    assert legend(RankSchedule(distribution="halving")) == "DyLoRA, halving, paced"
    assert legend(RankSchedule(distribution="halving", paced=False)) == "DyLoRA, halving"
    assert legend(RankSchedule(frozen=True)) == "DyLoRA, frozen"
    # What is as released but for one thing is not called so.
    assert legend(RankSchedule.paper()) == "DyLoRA as released"
    for changes in (
        {"distribution": "halving", "paced": False},
        {"paced": True},
        {"r_min": 2},
        {"full_rank_share": 0.5},
    ):
        assert legend(RankSchedule.paper(**changes)) not in ("DyLoRA as released", legend(RankSchedule()))


@pytest.mark.parametrize("steps", [0, -3, 2.5, "7", True])
def test_numbers_of_updates_that_are_none(steps):
    with pytest.raises(ValueError, match=r"steps is .*; a training has an int of 1 update or more"):
        RankSchedule().resolve(8, "alpha/r", steps)


@pytest.mark.parametrize("name", ["paced", "frozen"])
def test_a_word_is_no_switch(name):
    with pytest.raises(ValueError, match=f"{name} is 'False'; give True or False"):
        RankSchedule(sampling="step", **{name: "False"})


def test_facts_that_tell_no_training():
    assert title_of({}, 8) == title_of({"sampling": "zipf"}, 8) == "an adapter"


def test_a_schedule_is_a_value():
    assert RankSchedule(seed=1) == RankSchedule(seed=1) and hash(RankSchedule()) == hash(RankSchedule())
    with pytest.raises(dataclasses.FrozenInstanceError):
        RankSchedule().p = 0.5


def a_model():
    torch.manual_seed(0)
    model = lora.inject(
        torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)), ["0", "2"], r=4
    )
    lora.mark_only_lora_as_trainable(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, optimizer, batches, accumulate=1, prepare=lambda *given: given):
    model, optimizer = prepare(model, optimizer)
    for number, (x, y) in enumerate(batches):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return lora.lora_state_dict(model)


def data(n=6):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 6, generator=generator), torch.randint(0, 3, (5,), generator=generator)) for _ in range(n)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loop_over_the_batches_is_the_settings_one_by_one(accumulate):
    model, optimizer = a_model()
    bound = RankSchedule(seed=3).resolve(4, steps=12 // accumulate)

    def one_by_one():
        for number, batch in enumerate(data() * 2):
            bound.setting(number // accumulate, 5, number % accumulate).apply(model, optimizer)
            yield batch

    wanted = train(model, optimizer, one_by_one(), accumulate)
    model, optimizer = a_model()
    schedule = RankSchedule(seed=3).resolve(4)
    found = train(model, optimizer, schedule.over(data(), model, optimizer, 2, accumulate), accumulate)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert lora.get_rank(model) == 4 and model(torch.randn(9, 6)).shape == (9, 3)


def test_a_loop_with_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # other tests' precision
    model, optimizer = a_model()
    wanted = train(model, optimizer, RankSchedule().resolve(4).over(data(), model, optimizer))
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model, optimizer = a_model()
    loader = torch.utils.data.DataLoader(data(), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in RankSchedule().resolve(4).over(loader, accelerator.unwrap_model(model), optimizer):
        accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    found = lora.lora_state_dict(accelerator.unwrap_model(model))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_loop_that_is_left_early_leaves_the_model_at_r_max():
    model, optimizer = a_model()
    for _ in RankSchedule(full_rank_share=0).resolve(4).over(data(), model, optimizer):
        assert lora.get_rank(model) is None or isinstance(lora.get_rank(model), torch.Tensor)
        break
    assert lora.get_rank(model) == 4
    with pytest.raises(KeyError):
        for _ in RankSchedule(full_rank_share=0).resolve(4).over(data(), model, optimizer):
            raise KeyError
    assert lora.get_rank(model) == 4


def test_a_loop_over_another_adapter_than_the_schedules_is_refused():
    model, optimizer = a_model()
    with pytest.raises(
        ValueError, match="resolved for r_max 8 and scaling 'alpha/r', and the model has 4 and 'alpha/r'"
    ):
        next(RankSchedule().resolve(8).over(data(), model, optimizer))
    paper = lora.inject(torch.nn.Sequential(torch.nn.Linear(6, 3)), ["0"], r=4, scaling="alpha/b")
    with pytest.raises(ValueError, match="scaling 'alpha/r', and the model has 4 and 'alpha/b'; give these to resolve"):
        next(RankSchedule().resolve(4).over(data(), paper))
    next(RankSchedule().resolve(4, "alpha/b").over(data(), paper))


def test_a_loop_over_other_updates_than_the_schedules_is_refused():
    model, optimizer = a_model()
    bound = RankSchedule().resolve(4, steps=30)
    with pytest.raises(ValueError, match="resolved for 30 updates, and the batches make 6; give over"):
        next(bound.over(data(), model, optimizer))
    with pytest.raises(ValueError, match="resolved for 30 updates, and the batches make 6"):
        list(bound.over(iter(data()), model, optimizer))
    with pytest.raises(ValueError, match="knows no number of steps"):
        next(RankSchedule().resolve(4).over(iter(data()), model, optimizer))


def test_a_loader_without_a_length_needs_the_number_of_updates():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(12, 6))

    model = lora.inject(nn.Sequential(nn.Linear(6, 6)), ["0"], r=4)
    batches = torch.utils.data.DataLoader(Stream(), batch_size=2)
    schedule = RankSchedule().resolve(r_max=4, steps=6)
    ranks = [lora.get_rank(model) for _ in schedule.over(batches, model)]
    assert len(ranks) == 6


def test_paces_are_those_of_the_loop_alone_and_need_its_optimizer():
    model = lora.inject(nn.Sequential(nn.Linear(6, 6)), ["0"], r=4)
    schedule = RankSchedule(distribution="halving", full_rank_share=0.5).resolve(r_max=4)
    optimizer = torch.optim.AdamW([model[0].lora_A, model[0].lora_B])
    found = [paces_of(optimizer) for _ in schedule.over([torch.randn(6, 6)] * 4, model, optimizer)]
    assert found == [(1, 1, 1, 1)] * 2 + [(4, 2, 4 / 3, 1)] * 2
    assert paces_of(optimizer) is None
    with pytest.raises(ValueError, match="give the optimizer too, or RankSchedule"):
        next(schedule.over([torch.randn(6, 6)] * 4, model))


@given(st.integers(1, 20), st.data())
def test_components_that_no_lower_rank_uses_alone_learn_alike(r_max, data):
    r_min = data.draw(st.integers(1, r_max))
    bound = RankSchedule(distribution="halving", r_min=r_min).resolve(r_max, "alpha/r", 10)
    assert bound.setting(8, 4).paces == usual_paces(r_max, r_min)


def test_an_optimizer_of_another_model_is_refused():
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = torch.optim.AdamW(model.parameters())
    lora.inject(model, ["0"], r=4)
    with pytest.raises(ValueError, match="AdamW holds no parameter of the adapter: make it after inject"):
        next(RankSchedule().resolve(r_max=4).over([torch.randn(2, 6)], model, optimizer))


def test_each_process_of_a_loop_draws_for_itself(monkeypatch):
    def ranks(process):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: process)
        model = lora.inject(nn.Sequential(nn.Linear(6, 6)), ["0"], r=4)
        schedule = RankSchedule(distribution="uniform", full_rank_share=0.0).resolve(r_max=4)
        return [lora.get_rank(model).tolist() for _ in schedule.over([torch.randn(6, 6)] * 4, model)]

    assert ranks(0) == ranks(0) != ranks(1)


def test_a_compiled_model_takes_a_rank_for_each_example():
    model = lora.inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), ["0"], r=4)
    nn.init.normal_(model[0].lora_B)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 6)
    lora.set_rank(compiled, torch.tensor([1, 4, 2]))
    found = compiled(x)
    for i, b in enumerate((1, 4, 2)):
        with lora.use_rank(model, b):
            torch.testing.assert_close(found[i : i + 1], model(x[i : i + 1]))
