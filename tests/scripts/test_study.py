"""The study's methods, peers and cuts, and its commands from end to end on tiny data."""

import dataclasses
import json
import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers_dylora.tasks import TASKS

import loralib as lora
from loralib.model import lora_layers
from scripts.study import __main__ as study
from scripts.study import adalora, cells, language, language_tables, loading, reducing, running
from scripts.study import methods as study_methods
from scripts.study import trainer as study_trainer
from scripts.study import tried as study_tried

from ..nlu.test_data import write


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any), st.integers(1, 70), st.integers(0, 99))
def test_an_even_draw_gives_each_rank_its_share(weights, n, seed):
    ranks = study_trainer.even_draw(weights, n, str(seed))
    assert len(ranks) == n and torch.equal(ranks, study_trainer.even_draw(weights, n, str(seed)))
    for b, weight in enumerate(weights, 1):
        assert abs(int((ranks == b).sum()) - n * weight / sum(weights)) < 1 + 1e-9


def test_matryoshkalora_is_as_released():
    """The gate of scale(1) + .. over ranks 1, 2, 4, 8, no alpha, lora_A drawn with a bound of 1/sqrt(r)."""
    for name, scale in (("1", lambda b: 1.0), ("1/r", lambda b: 1 / b), ("1/sqrt(r)", lambda b: b**-0.5)):
        method = study_methods.METHODS[f"matryoshka-{name}"]
        model = torch.nn.Sequential(torch.nn.Linear(50, 6))
        lora.inject(model, ["0"], r=method.r, lora_alpha=method.alpha, scaling=method.scaling)
        study_trainer.StudyTrainer.widen(model)
        layer = model[0]
        assert 0.8 / 8**0.5 < layer.lora_A.abs().max() <= 1 / 8**0.5
        torch.nn.init.normal_(layer.lora_B)
        method.schedule.resolve(method.r, method.scaling, 10).setting(0, 4).apply(model)
        x = torch.randn(4, 50)
        wanted = layer.base_layer(x) + sum(
            scale(b) * x @ layer.lora_A[:b].T @ layer.lora_B[:, :b].T for b in (1, 2, 4, 8)
        )
        torch.testing.assert_close(model(x), wanted)
        for b in (1, 2, 4, 8):
            lora.set_rank(model, b)
            wanted = layer.base_layer(x) + scale(b) * x @ layer.lora_A[:b].T @ layer.lora_B[:, :b].T
            torch.testing.assert_close(model(x), wanted)


def test_the_reduction_by_svd_is_pefts_at_every_rank(roberta_checkpoint, tmp_path):
    from peft import PeftModel, convert_to_lora
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    model = lora.inject(stock, ["query", "value"], r=8, lora_alpha=16)
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    lora.save_adapter(model, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    reducing.cut(model, "cut-svd")
    found = dict(lora_layers(model))
    assert len(found) == 4
    for b in (1, 3, 8):
        config, state = convert_to_lora(adapted, rank=b)
        for path, layer in found.items():
            key = f"base_model.model.{path}.lora_"
            wanted = config.lora_alpha / config.r * state[f"{key}B.weight"] @ state[f"{key}A.weight"]
            update = 2 * layer.lora_B[:, :b] @ layer.lora_A[:b]  # alpha / r is 2
            torch.testing.assert_close(update, wanted, rtol=1e-3, atol=1e-4)


def encoder_with_adapters():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, num_labels=2, max_position_embeddings=20)).double()
    lora.inject(model.eval(), ["query", "value"], r=3)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    return model, torch.randint(5, 50, (4, 7))


def test_ways_of_cutting_do_not_depend_on_their_order():
    model, inputs = encoder_with_adapters()
    restore, found = reducing.as_trained(model), []
    for names in (study_methods.CUTS, reversed(study_methods.CUTS)):
        logits = {}
        for name in names:
            restore()
            reducing.cut(model, name)
            with lora.use_rank(model, 2):
                logits[name] = model(input_ids=inputs).logits
        found.append(logits)
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name])
    assert not torch.allclose(found[0]["cut-alpha/r"], found[0]["cut-svd"])


def test_a_model_is_reduced_to_its_most_important_components_and_whole_again():
    model, inputs = encoder_with_adapters()
    batches = [{"input_ids": inputs, "labels": torch.tensor([0, 1, 1, 0])}]
    scores = reducing.importance(model, batches)
    before, layers = model(input_ids=inputs).logits, [layer for _, layer in lora_layers(model)]
    for b in reducing.with_components(model, reducing.to_keep(model, "importance", (1, 2, 3), batches)):
        kept = {layer: layer.lora_B.detach().abs().sum(0) > 0 for layer in layers}
        assert sum(int(each.sum()) for each in kept.values()) == b * len(layers)
        left = [float(s) for layer in layers for s, k in zip(scores[layer], kept[layer], strict=True) if k]
        gone = [float(s) for layer in layers for s, k in zip(scores[layer], kept[layer], strict=True) if not k]
        assert not gone or min(left) >= max(gone)
        if b == 3:
            torch.testing.assert_close(model(input_ids=inputs).logits, before)
    torch.testing.assert_close(model(input_ids=inputs).logits, before)


def test_whitened_components_lose_the_least_of_what_the_data_gives():
    """Their squares are what each adds to a layer's mean squared output, and those that are cut are lost, no more; a
    cut by SVD loses more."""
    model, inputs = encoder_with_adapters()
    batches = [{"input_ids": inputs, "attention_mask": (torch.arange(7) < torch.tensor([7, 5, 6, 2])[:, None]).long()}]
    passed = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: passed.update({layer: args[0]}))
        for _, layer in lora_layers(model)
    ]
    with torch.no_grad():
        model(**batches[0])
    for hook in hooks:
        hook.remove()
    xs = {layer: x[batches[0]["attention_mask"].bool()] for layer, x in passed.items()}
    update = {layer: (layer.lora_B @ layer.lora_A).detach() for layer in xs}

    def lost(layer, b):
        kept = (layer.lora_B[:, :b] @ layer.lora_A[:b]).detach()
        return float((layer.strength() * xs[layer] @ (update[layer] - kept).T).square().sum(1).mean())

    lora.order_components(model)
    by_svd = {layer: lost(layer, 1) for layer in xs}
    for layer, sizes in reducing.whitened(model, batches).items():
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, update[layer])
        for b in (0, 1, 2, 3):
            assert lost(layer, b) == pytest.approx(float(sizes[b:].square().sum()), rel=1e-6, abs=1e-9)
        assert lost(layer, 1) <= by_svd[layer] * (1 + 1e-9)
    assert any(lost(layer, 1) < 0.99 * by_svd[layer] for layer in xs)


@pytest.mark.parametrize("name", ["again-3", "rising"])
def test_ordered_once_more_and_shares_that_rise(name):
    method = study_tried.TRIED[name]
    trainer = study_trainer.StudyTrainer.__new__(study_trainer.StudyTrainer)
    bound = method.schedule.resolve(8, "alpha/r", 100)
    plain = types.SimpleNamespace(
        method=method, bound=bound, asked=[lora.RankSchedule(seed=0)], ordered=True, groups=[*method.tail],
        args=types.SimpleNamespace(seed=0, process_index=0), state=types.SimpleNamespace(max_steps=100),
        place=types.SimpleNamespace(micro=0, size=lambda n=0: 60, places=lambda: range(60)),
    )  # fmt: skip
    vars(trainer).update(vars(plain))
    orders, at_1 = [], []
    for step in range(80, 100):
        trainer.state.global_step = step
        setting = trainer.training_setting(60)
        orders += [step] if setting.order else []
        at_1 += [int((setting.rank[:, 0] == 1).sum())] if name == "rising" else []
    assert orders == {"again-3": [87, 93], "rising": []}[name]
    if name == "rising":
        assert at_1[0] == 10 and at_1[-1] == 30 and at_1 == sorted(at_1)


@pytest.mark.parametrize("b", [1, 2, 3])
def test_one_threshold_keeps_the_nearest_update_and_one_share_is_pefts(b):
    """Of all ways to keep b * layers components the largest singular values leave the smallest error (Eckart-Young);
    with one share every layer has the rank that PEFT gives it, and no larger share would fit."""
    from peft.tuners.lora.conversion import _find_cutoff_index

    model, _ = encoder_with_adapters()
    lora.order_components(model)
    layers = [layer for _, layer in lora_layers(model)]
    values = {
        layer: torch.linalg.svdvals(layer.strength() * layer.lora_B @ layer.lora_A)[: layer.r] for layer in layers
    }
    for layer, own in reducing.singular_values(model).items():
        torch.testing.assert_close(own, values[layer].detach())
    kept = reducing.to_keep(model, "values", (b,), [])[b]
    flat = torch.cat(list(values.values())).sort(descending=True).values
    chosen = torch.cat([values[layer][kept[layer]] for layer in layers]).sort(descending=True).values
    torch.testing.assert_close(chosen, flat[: b * len(layers)])
    counts = [int(each.sum()) for each in reducing.to_keep(model, "energy", (b,), [])[b].values()]
    assert sum(counts) <= b * len(layers)

    def of_peft(share):
        return [min(_find_cutoff_index(own.detach(), share), own.numel()) for own in values.values()]

    shares = [k / 1000 for k in range(1, 1000)]
    assert any(of_peft(share) == counts for share in shares) or b == layers[0].r
    assert max(sum(of_peft(share)) for share in shares if sum(of_peft(share)) <= b * len(layers)) == sum(counts)


@pytest.fixture
def as_it_was():
    """A run takes one thread and silences transformers; what comes after finds both as they were."""
    from transformers.utils import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture
def tiny(tmp_path, monkeypatch, roberta_checkpoint, as_it_was):
    """Options of the commands, on rte and cola with a few examples each."""
    for task in ("rte", "cola"):
        write(tmp_path / "glue" / task, TASKS[task])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return ["--encoder", str(roberta_checkpoint), "--data", str(tmp_path / "glue"), "--results", str(tmp_path / "results"),
            "--processes", "1"]  # fmt: skip


@pytest.mark.slow
def test_rates_runs_tables_and_a_cell_again(tiny, tmp_path, capfd, monkeypatch):
    few = ["--methods", "lora-1", "lora-8", "example"]
    monkeypatch.setattr(cells, "RATE_RUNS", (("cola", 0), ("rte", 0)))
    monkeypatch.setattr(cells, "RATES", (1e-3,))
    monkeypatch.setattr(cells, "LIMITS", (8e-4, 1.5e-3))  # no rate beyond
    keep = ["--keep", str(tmp_path / "keep")]
    study.main(["rates", *tiny, *keep, *few])
    capfd.readouterr()
    study.main(["rates", *tiny, *keep, *few])
    assert "runs are there" not in capfd.readouterr().out  # nothing is left to do
    study.main(["runs", *tiny, *few, *keep, "--tasks", "rte", "cola", "--seeds", "0"])
    assert len(list((tmp_path / "keep").glob("*/checkpoint-*"))) >= 2
    lines = cells.read_records(tmp_path / "results" / "runs.jsonl")
    runs = {(r["task"], r["method"]): r for r in lines if r["split"] == "validation"}
    cuts = {name for name, made in study_methods.CUTS.items() if made.of == "lora-8" and not made.tried}
    assert {method for _, method in runs} == {"lora-1", "lora-8", "example", *cuts}
    for task in ("rte", "cola"):
        whole = runs[task, "lora-8"]["scores"]["8"]
        unchanged = {runs[task, cut]["scores"]["8"] for cut in cuts if study_methods.CUTS[cut].by != "strengths"}
        assert unchanged == {whole}  # at rank 8 nothing is cut
    capfd.readouterr()
    study.main(["cell", "rte", "example", "0", *tiny[:-2]])
    again = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert again["scores"] == runs["rte", "example"]["scores"] and again["rate"] == runs["rte", "example"]["rate"]
    study.main(["cell", "cola", "cut-svd", "0", *tiny[:-2]])
    (again,) = [json.loads(text) for text in capfd.readouterr().out.splitlines() if text.startswith('{"')]
    assert again["scores"] == runs["cola", "cut-svd"]["scores"]
    monkeypatch.setattr(cells, "LEAD_RUNS", (("rte", 0),))
    tried = ["ordered-gate", "ordered-distil", "by-cost-0.8", study_methods.DEFAULT]
    study.main(["leads", *tiny, *keep, "--methods", "lora-8", *tried])
    lines = cells.read_records(tmp_path / "results" / "runs.jsonl")
    origin = {line["method"]: line.get("from") for line in lines if line["split"] == "held_out"}
    assert origin["ordered-gate"] == origin["by-cost-0.8"] == "lora-8" and origin["example"] is None
    assert origin["mixed-0.8-fisher"] == origin[study_methods.DEFAULT] == "lora-8"
    assert origin["mixed-0.8-heads"] == origin["mixed-0.8-strengths"] == "lora-8"
    study.main(["tables", "--results", str(tmp_path / "results")])
    text, tries = ((tmp_path / "results" / name).read_text() for name in ("tables.md", "choosing.md"))
    assert "ordered, then fixed gate" in tries and "ordered, then distilled" in tries
    assert "DyLoRA, per example" in text and (tmp_path / "results" / "curves.png").stat().st_size > 10_000


def test_runs_without_a_chosen_rate_say_what_to_do_and_take_a_given_one(tiny, tmp_path, capsys):
    one = ["--methods", "example", "--tasks", "rte", "--seeds", "0"]
    with pytest.raises(SystemExit):
        study.main(["runs", *tiny, *one])
    assert "run `python -m scripts.study rates` first" in capsys.readouterr().err
    study.main(["runs", *tiny, *one, "--rate", "1e-3"])
    (line,) = cells.read_records(tmp_path / "results" / "runs.jsonl")
    assert (line["rate"], line["split"], line["method"]) == (1e-3, "validation", "example")


@pytest.mark.parametrize("given", [["rte", "example"], ["boolq", "example", "0"], ["rte", "none", "0"]])
def test_a_cell_that_is_none_says_which_there_are(given, tiny, capsys):
    with pytest.raises(SystemExit):
        study.main(["cell", *given, *tiny[:-2]])
    assert "a task (cola, rte" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["cell", "webnlg", "lora-8", "0", "--encoder", "e"], "webnlg needs --model"),
        (["cell", "cola", "lora-8", "0", "--model", "m"], "cola needs --encoder"),
        (["wide", "--encoder", "e", "--seeds", "5"], "unrecognized arguments: --seeds 5"),
        (["language", "--encoder", "e"], "--model"),
        (["rates", "--encoder", "e", "--r-max", "16", "--methods", "lora-1"], "lora-1: of a rank of its own"),
    ],
)
def test_a_command_takes_its_own_flags_alone(line, sentence, capsys):
    with pytest.raises(SystemExit):
        study.main(line)
    assert sentence in capsys.readouterr().err


def test_a_method_of_ones_own_beside_the_wide_tables_and_at_a_rate_of_ones_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "run_all", lambda wanted, options: asked.extend(wanted))
    more = ["--results", str(tmp_path)]
    study.main(["wide", "--encoder", "e", "--methods", "halving", *more])
    wanted = [
        (task, "halving", r_max, seed) for r_max, seeds in ((16, (0, 1)), (64, (0,))) for seed in seeds
        for task in cells.WIDE_TASKS
    ]  # fmt: skip
    wanted += [(task, "halving", study_methods.R_MAX, seed) for seed in (0, 1) for task in cells.WIDE_TASKS]
    assert [(c.task, c.method, c.r_max, c.seed) for c in asked] == wanted
    asked.clear()
    study.main(["language", "--model", "m", "--methods", "halving", "--rate", "2e-3", "--seeds", "1", *more])
    assert [(c.split, c.seed, c.rate) for c in asked] == [("held_out", 0, 2e-3), ("validation", 1, 2e-3)]


# One of each kind of variant.
VARIANTS = [
    *("ordered-0.3", "ordered-geometric", "mixed-0.9", "thirds-0.8", "by-cost-0.8", "ordered-gate", "ordered-distil"),
    *(
        "again-3",
        "rising",
        "strengths-1/k",
        "paces-1/k",
        "paces-by-cost",
        "paces-late",
        "stretched-by-cost",
        "stretched-late",
        "skewed-1/k",
        "long-1/k",
        "grown-0.5",
        "nested-0.3-1/k",
        "anneal-constant",
        "plus-constant",
        "orthogonal-constant",
        "shuffled-constant",
        "distil-constant",
        "mean-constant",
    ),
]


def test_a_pace_leaves_the_update_as_it_is_and_moves_it_faster():
    """Against what it says: at each rank the same product at the ordering, and of a step of Adam's size, which is the
    rate whatever the gradient, component k's part of B A moves paces[k] times as far."""
    layer = lora.Linear(6, 5, r=2, lora_alpha=4, scaling="alpha/r")
    torch.nn.init.normal_(layer.lora_B)
    model = torch.nn.Sequential(layer)
    optimizer = torch.optim.Adam([layer.lora_B], lr=1e-3)
    paces = torch.tensor([8.0, 0.5])
    setting = study_trainer.AtPaces(torch.tensor([1, 2]), order=True, faster=(8.0, 0.5), strength=2.0)
    lora.order_components(model)
    x = torch.randn(2, 6)
    lora.set_rank(model, torch.tensor([1, 2]))
    wanted = model(x)
    setting.apply(model, optimizer)
    torch.testing.assert_close(model(x), wanted)
    before = layer.lora_B.detach() * paces
    model(x).square().sum().backward()
    optimizer.step()
    moved = (layer.lora_B.detach() * paces - before).abs()
    torch.testing.assert_close(moved, (1e-3 * paces).expand(5, 2), rtol=1e-2, atol=1e-6)


def test_a_stretch_leaves_the_update_and_its_gradient_as_they_are():
    """The running means of Adam are those that gradients of the stretched factors would have given."""
    torch.manual_seed(0)
    made = []
    for stretched in (False, True):
        torch.manual_seed(1)
        layer = lora.Linear(6, 5, r=2, lora_alpha=4, scaling="alpha/r")
        torch.nn.init.normal_(layer.lora_B)
        model, x = torch.nn.Sequential(layer), torch.randn(3, 6)
        lora.order_components(model)
        optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=1e-9)
        setting = study_trainer.Stretched(2, factors=(4.0, 0.5))
        for when in ("first", "after a step"):
            if stretched == (when == "first"):
                setting.apply(model, optimizer)
            if when == "first":
                model(x).square().sum().backward()
                optimizer.step()
        made.append((model(x), *(layer.lora_A, layer.lora_B), optimizer.state.values()))
    torch.testing.assert_close(made[0][:3], made[1][:3])
    for early, late in zip(made[0][3], made[1][3], strict=True):
        torch.testing.assert_close((early["exp_avg"], early["exp_avg_sq"]), (late["exp_avg"], late["exp_avg_sq"]))


def test_a_skewed_part_ends_in_the_update_that_it_trained():
    layer = lora.Linear(6, 5, r=2, lora_alpha=4, scaling="alpha/r")
    torch.nn.init.normal_(layer.lora_B)
    model, x = torch.nn.Sequential(layer), torch.randn(3, 6)
    before = layer.lora_B.detach() * torch.tensor([8.0, 0.5]) @ layer.lora_A.detach() * 2
    wanted = x @ (layer.weight + before).T + layer.bias
    setting = study_trainer.Skewed(2, factors=(8.0, 0.5), strength=2.0)
    setting.apply(model)
    torch.testing.assert_close(model(x), wanted)
    dataclasses.replace(setting, order=True).apply(model, torch.optim.Adam(model.parameters()))
    torch.testing.assert_close(model(x), wanted)
    assert lora.get_rank(model) == 2


@pytest.mark.parametrize("r_max", [16, 64])
def test_a_method_at_another_r_max_is_as_strong_and_measured_at_powers_of_two(r_max):
    ranks = [2**k for k in range(r_max.bit_length())]
    for name in ("lora-8", study_methods.DEFAULT):
        method = study_tried.named(name).at(r_max)
        assert (method.r, method.strength) == (r_max, 2)
        assert method.ranks == ([r_max] if name == "lora-8" else ranks)
    assert study_tried.named("lora-2").at(r_max) == study_tried.named("lora-2")  # trained for rank 2, whatever r_max
    summed = study_tried.named("matryoshka-1/r").at(r_max)
    assert list(summed.schedule.gate_ranks) == ranks and summed.strength == 1 / r_max
    with pytest.raises(ValueError, match="is for r_max 8 alone"):
        study_tried.named("squeeze-1").at(r_max)


def webnlg(directory, n: int) -> None:
    directory.mkdir(parents=True)
    for split in ("train", "validation"):
        entries = [
            {"category": "x", "triples": [["w1", f"w{i}", "w2"]] * (1 + i % 3), "references": [f"w3 w{i}", "w4"]}
            for i in range(n)
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.mark.slow
def test_a_language_model_from_its_rates_to_its_table(tmp_path, monkeypatch, as_it_was):
    from ..loralib.training.test_trl import language_model, tokenizer

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(cells.LANGUAGE, "webnlg", cells.Budget(epochs=1, train=24, validation=8, batch=8))
    monkeypatch.setattr(cells, "RATES", (1e-2,))
    monkeypatch.setattr(cells, "LIMITS", (9e-3, 1.1e-2))
    language_model(None).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    webnlg(tmp_path / "glue" / "webnlg", 40)  # all different
    apart = cells.Cell("webnlg", "lora-8", 0, 1e-2, "held_out", targets=cells.ALL_LINEAR)
    train, measured = language.entries(apart, str(tmp_path / "glue"))
    assert not set(map(str, train["references"])) & set(map(str, measured["references"]))
    given = [
        "--data",
        str(tmp_path / "glue"),
        "--results",
        str(tmp_path / "results"),
        "--model",
        str(tmp_path / "base"),
    ]
    few = ["--methods", "lora-1", "lora-8", study_methods.DEFAULT, "--seeds", "0"]
    study.main(["language", *given, "--processes", "1", "--keep", str(tmp_path / "keep"), *few])
    lines = cells.read_records(tmp_path / "results" / "runs.jsonl")
    runs = {r["method"]: r for r in lines if r["split"] == "validation"}
    strengths = {"cut-strengths", "mixed-0.8-strengths"}
    assert set(runs) == {"lora-1", "lora-8", "cut-svd", study_methods.DEFAULT, *strengths}
    assert runs["mixed-0.8-strengths"]["before"] == runs[study_methods.DEFAULT]["scores"]
    assert runs["cut-strengths"]["before"] == runs["cut-svd"]["scores"] != runs["cut-strengths"]["scores"]
    assert runs[study_methods.DEFAULT]["from"] == "lora-8" and runs["lora-8"]["metric"] == "loss"
    assert runs["cut-svd"]["scores"]["8"] == pytest.approx(runs["lora-8"]["scores"]["8"], abs=2e-4)
    assert 0 < runs["lora-8"]["scores"]["8"] < math.log(64)
    study.main(["tables", "--results", str(tmp_path / "results")])
    text = (tmp_path / "results" / "README.md").read_text()
    assert "## A language model" in text and "On 200 entries of validation, seed 0, mean" in text


def test_runs_of_a_language_model_are_compared_within_a_precision():
    """The default has more seeds in bf16: its table is of these alone, and each variant stands beside what was computed
    as it was."""

    def run(method, split, seed, precision, loss):
        scores = {str(b): loss for b in study_methods.SHOWN}
        place = dict(device="cpu", precision=precision, r_max=8, targets=cells.ALL_LINEAR, metric="loss")
        return dict(task="webnlg", method=method, seed=seed, rate=1e-3, split=split, scores=scores, **place)

    records = [run(study_methods.DEFAULT, "validation", seed, "bf16", 2.0) for seed in (0, 1)]
    records += [run("cut-svd", "validation", seed, "bf16", 2.5) for seed in (0, 1)]
    records += [run(name, "validation", 0, "fp32", 9.0) for name in ("cut-svd", study_methods.DEFAULT)]
    records += [run(study_methods.DEFAULT, "held_out", 0, precision, 3.0) for precision in ("bf16", "fp32")]
    records += [run("mixed-0.9", "held_out", 0, "bf16", 4.0), run("mixed-0.7", "held_out", 0, "fp32", 5.0)]
    on_validation = "\n".join(language_tables.validation_tables(records))
    held_out = "\n".join(language_tables.held_out_tables(records))
    assert "On 200 entries of validation, seeds 0, 1, mean" in on_validation and "9.0" not in on_validation
    assert "| the default minus SVD | -0.5000 ± 0.0000 |" in on_validation
    in_bf16, in_fp32 = held_out.split("tried, on: cpu, bf16 |")[1].split("tried, on: cpu, fp32 |")
    assert "4.0000" in in_bf16 and "5.0000" not in in_bf16 and "3.0000" in in_bf16
    assert "5.0000" in in_fp32 and "4.0000" not in in_fp32 and "3.0000" in in_fp32


def test_the_completion_alone_is_counted_and_cut_entries_without_one_are_left_out():
    from datasets import Dataset

    from ..loralib.training.test_trl import tokenizer

    entries = [{"triples": [["w1", "w2", "w3"]], "references": ["w4 w5", "w6"]}] * 2
    entries.append({"triples": [["w1", "w2", "w3"]] * 9, "references": ["w4"]})
    found = language.tokenised(Dataset.from_list(entries), tokenizer(), 20)
    assert len(found) == 2
    row, words = found[0], tokenizer()
    prompt = words(language.prompt_of(entries[0]))["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :] == words("w4 w5")["input_ids"] + [2]


@pytest.mark.parametrize("b", [1, 4])
def test_adalora_ends_at_its_budget(b, roberta_checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from loralib.trainer import DyLoRATrainer

    model = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    rows = [{"input_ids": [5 + i % 7, 6, 7 + i % 5], "labels": i % 2} for i in range(80)]
    model = adalora.with_adalora(model, b, ["query", "value"], 40)
    whole = adalora.components(model)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, learning_rate=1e-2, max_steps=40, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DyLoRATrainer(model=model, args=args, train_dataset=rows, callbacks=[adalora.Allocate()])
    before = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.dense.weight"].clone()
    trainer.train()
    assert adalora.components(model) == b * 4 and whole == 0  # it starts from singular values of zero
    after = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.dense.weight"]
    assert not torch.equal(before, after)  # the head trains too


def test_updates_are_those_of_the_trainer():
    assert loading.updates(cells.Cell("sst2", "lora-8", 0, 1e-3), 10_000) == 2 * 313


def test_the_default_is_the_librarys():
    method = study_methods.METHODS[study_methods.DEFAULT]
    ours = lora.RankSchedule().resolve(8, "alpha/r", 100)
    assert method.schedule.resolve(8, method.scaling, 100).facts() == ours.facts() and method.strength == 2


def test_no_kind_of_variant_is_left_out():
    def kind(method):
        plain = study_methods.Method("")
        own = {name for name in vars(plain) if getattr(method, name) != getattr(plain, name)}
        return frozenset(own - {"title", "alpha", "scaling", "schedule"}), method.schedule.sampling

    tried = {kind(method) for method in study_tried.TRIED.values()}
    assert tried <= {kind(study_tried.TRIED[name]) for name in VARIANTS} | {kind(study_methods.METHODS["matryoshka-1"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(name, tiny, tmp_path, roberta_checkpoint):
    (found,) = running.run_cell(
        cells.Cell("rte", name, 0, 1e-3, "held_out"), str(roberta_checkpoint), str(tmp_path / "glue")
    )
    assert list(found["scores"]) == ["1", "2", "4", "8"] and found["steps"] > 0
