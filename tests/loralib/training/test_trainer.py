"""DyLoRATrainer on a tiny RoBERTa: exact splits, exact resuming, all ranks in one pass."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    RobertaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

import loralib as lora
from loralib import all_ranks
from loralib.adapters.directory import cut_adapter
from loralib.pacing import paces_of
from loralib.trainer import DyLoRATrainer


def data(n, seed=0, labels=True):
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        ids = [1, *generator.integers(4, 100, generator.integers(3, 20)).tolist(), 2]
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                **({"labels": int(sum(ids) % 3)} if labels else {}),
                "row": i,
            }
        )
    return datasets.Dataset.from_list(rows)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(config, checkpoint, output, n=22, scaling="alpha/r", **options):
    torch.manual_seed(0)
    model = lora.inject(
        RobertaForSequenceClassification(config), ["query", "value"], r=4, lora_alpha=8, scaling=scaling
    )
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    names = {field.name for field in dataclasses.fields(lora.RankSchedule)} - {"seed"}
    schedule = lora.RankSchedule(**{name: options.pop(name) for name in names & options.keys()})
    own = {name: options.pop(name) for name in ("eval_ranks", "compute_metrics") if name in options}
    args = TrainingArguments(
        output_dir=str(output), report_to="none", use_cpu=True, disable_tqdm=True, seed=3, logging_steps=1,
        **{"per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2, "save_strategy": "no", **options},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return DyLoRATrainer(
        model=model, args=args, train_dataset=data(n), eval_dataset=data(13, 1), processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), schedule=schedule, **{"compute_metrics": accuracy, **own},
    )  # fmt: skip


def log(t):
    t.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in t.state.log_history if "grad_norm" in entry]


@pytest.mark.parametrize("sampling", ["example", "step", "matryoshka", "fixed"])
def test_every_split_into_micro_batches_gives_the_same_losses_and_gradients(
    sampling, roberta_config, roberta_checkpoint, tmp_path
):
    """22 examples in updates of 8: the last one is incomplete."""
    runs = [
        log(trainer(roberta_config, roberta_checkpoint, tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=8 // b,
                    sampling=sampling))
        for b in (8, 4, 1)
    ]  # fmt: skip
    assert len(runs[0]) == 3
    for run in runs[1:]:
        assert np.allclose(run, runs[0], rtol=2e-4)


WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from transformers import RobertaConfig
from tests.loralib.training.test_trainer import log, trainer
config = RobertaConfig.from_dict(json.loads(sys.argv[2]))
t = trainer(config, sys.argv[3], sys.argv[4], per_device_train_batch_size=2, gradient_accumulation_steps=2, frozen=sys.argv[5] == "frozen",
            n=int(sys.argv[6]))
run = log(t)
metrics = t.evaluate()
logits = t.predict(t.eval_dataset).predictions
if t.is_world_process_zero():
    Path(sys.argv[4], "out.json").write_text(json.dumps([run, metrics, logits.tolist()]))
t.end()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "n"), [("free", 22), ("frozen", 17)])
def test_two_processes_give_what_one_gives(frozen, n, roberta_config, roberta_checkpoint, tmp_path):
    """With n = 17 the last update has one example for two processes; evaluation has an odd count, 13."""
    root = Path(__file__).parents[3]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no_python",
        sys.executable,
    ]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    arguments = [
        str(root),
        json.dumps(roberta_config.to_dict()),
        str(roberta_checkpoint),
        str(tmp_path),
        frozen,
        str(n),
    ]
    done = subprocess.run(
        [*command, str(script), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run, metrics, logits = json.loads((tmp_path / "out.json").read_text())
    alone = trainer(roberta_config, roberta_checkpoint, tmp_path, frozen=frozen == "frozen", n=n)
    assert np.allclose(run, log(alone), rtol=5e-4)
    wanted = alone.evaluate()
    assert all(metrics[k] == pytest.approx(wanted[k], abs=2e-4) for k in wanted if "accuracy" in k or "loss" in k)
    assert np.allclose(logits, alone.predict(alone.eval_dataset).predictions, atol=2e-3)


@pytest.mark.parametrize("sampling", ["example", "step"])  # ranks stacked in a pass, and one after the other
def test_all_ranks_in_one_pass_are_each_rank_alone_in_the_datas_order(
    sampling, roberta_config, roberta_checkpoint, tmp_path
):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, per_device_eval_batch_size=4, sampling=sampling)
    output = t.predict(t.eval_dataset)
    assert output.predictions.shape == (13, 4, 3)
    for b in range(1, 5):
        lora.set_rank(t.model, b)
        for i, row in enumerate(t.eval_dataset):
            alone = t.model.eval()(torch.tensor([row["input_ids"]])).logits[0]
            assert np.allclose(output.predictions[i, b - 1], alone.detach(), atol=1e-5)
    assert output.label_ids.tolist() == t.eval_dataset["labels"]
    logits, labels = torch.tensor(output.predictions), torch.tensor(output.label_ids)
    for k in range(4):
        assert output.metrics[f"test_r{k + 1}_accuracy"] == pytest.approx(
            float((logits[:, k].argmax(-1) == labels).float().mean())
        )
        assert output.metrics[f"test_r{k + 1}_loss"] == pytest.approx(
            torch.nn.functional.cross_entropy(logits[:, k], labels).item(), rel=1e-5
        )
    curve = [output.metrics[f"test_r{b}_accuracy"] for b in range(1, 5)]
    assert output.metrics["test_mean_accuracy"] == pytest.approx(np.mean(curve))
    assert output.metrics["test_aurac_accuracy"] == pytest.approx(np.trapezoid(curve) / 3)
    assert output.metrics["test_loss"] == pytest.approx(
        np.mean([output.metrics[f"test_r{b}_loss"] for b in range(1, 5)])
    )


def test_one_pass_over_the_data(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path)
    seen = []
    collate = t.data_collator
    t.data_collator = lambda rows: seen.append(len(rows)) or collate(rows)
    t.evaluate()
    assert sum(seen) == 13


@pytest.mark.parametrize("sampling", ["example", "step"])
def test_the_ranks_of_a_batch_share_its_embeddings(sampling, roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(all_ranks, "STACKED_TOKENS", 0)
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, per_device_eval_batch_size=4, sampling=sampling)
    calls, forward = [], type(t.model.roberta.embeddings).forward
    t.model.roberta.embeddings.forward = lambda *args, **kwargs: (
        calls.append(torch.is_grad_enabled()) or forward(t.model.roberta.embeddings, *args, **kwargs)
    )
    t.evaluate()
    assert calls == [False] * 4  # 13 examples, each at 4 ranks


def test_some_ranks_only(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, eval_ranks=[4, 1])
    metrics = t.evaluate()
    assert t.predict(t.eval_dataset).predictions.shape == (13, 2, 3)
    assert "eval_r2_accuracy" not in metrics
    assert metrics["eval_aurac_accuracy"] == pytest.approx(
        (metrics["eval_r1_accuracy"] + metrics["eval_r4_accuracy"]) / 2
    )


def test_without_a_metric_the_losses_of_all_ranks_are_reported(roberta_config, roberta_checkpoint, tmp_path):
    with_metric = trainer(roberta_config, roberta_checkpoint, tmp_path).evaluate()
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, compute_metrics=None)
    metrics = t.evaluate()
    assert metrics["eval_loss"] == pytest.approx(with_metric["eval_loss"], rel=0.05)
    assert {f"eval_r{b}_loss" for b in range(1, 5)} <= metrics.keys()
    assert t.predict(data(5, labels=False)).predictions.shape == (5, 4, 3)


def test_evaluation_during_training_is_of_fixed_ranks_and_leaves_training_alone(
    roberta_config, roberta_checkpoint, tmp_path
):
    """The released code evaluates at whatever rank was drawn last."""
    config = type(roberta_config).from_dict(roberta_config.to_dict() | {"hidden_dropout_prob": 0.1})
    quiet = log(trainer(config, roberta_checkpoint, tmp_path))
    t = trainer(config, roberta_checkpoint, tmp_path, eval_strategy="steps", eval_steps=1)
    assert log(t) == quiet
    last = [entry for entry in t.state.log_history if "eval_r1_accuracy" in entry][-1]
    assert all(last[k] == pytest.approx(v) for k, v in t.evaluate().items() if "accuracy" in k)


def drawn_ranks(t, monkeypatch):
    found = []

    def record(model, rank, frozen=False):
        if model.training:
            found.append((t.state.global_step, rank if isinstance(rank, int) else tuple(rank.tolist())))
        return lora.set_rank(model, rank, frozen)

    monkeypatch.setattr("loralib.setting.set_rank", record)
    t.train()
    return found


def test_a_rank_per_step_is_the_same_for_all_micro_batches(roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=4, sampling="step")
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, full_rank_share=0, **options)
    drawn = drawn_ranks(t, monkeypatch)
    assert len(drawn) == 4 * 11
    by_step = {step: {rank for s, rank in drawn if s == step} for step, _ in drawn}
    assert all(len(ranks) == 1 for ranks in by_step.values()) and len({r for s in by_step.values() for r in s}) > 1


def test_a_rank_per_example_and_r_min(roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, r_min=3, full_rank_share=0)
    drawn = drawn_ranks(t, monkeypatch)
    assert [len(ranks) for _, ranks in drawn] == [8, 8, 6]
    assert {r for _, ranks in drawn for r in ranks} == {3, 4}


@pytest.mark.parametrize("sampling", ["example", "step"])
def test_full_rank_first_then_ordered_once_then_drawn(
    sampling, roberta_config, roberta_checkpoint, tmp_path, monkeypatch
):
    """12 updates of 8 in micro-batches of 2; ordered before the fourth's first one, with the optimizer's state."""
    ordered = []

    def order(model, optimizer):
        assert optimizer.state[next(p for n, p in model.named_parameters() if n.endswith("lora_A"))]["exp_avg"].any()
        ordered.append(t.state.global_step)
        lora.order_components(model, optimizer)

    monkeypatch.setattr("loralib.setting.order_components", order)
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, sampling=sampling, full_rank_share=0.25, num_train_epochs=4,
        distribution="uniform", per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    drawn = drawn_ranks(t, monkeypatch)
    assert ordered == [3]
    ranks = {step: {r for s, own in drawn if s == step for r in np.atleast_1d(own)} for step in range(12)}
    assert all(ranks[step] == {4} for step in range(3)) and set.union(*(ranks[s] for s in range(3, 12))) == {1, 2, 3, 4}


@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_halving_after_an_early_ordering(split, roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    """10 updates of 8: after the third, four examples of an update at rank 4, two at 1 and two at 2."""
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, n=40, num_train_epochs=2, distribution="halving",
        full_rank_share=0.3, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
    )  # fmt: skip
    rows, paces = {}, {}
    own_setting = t.training_setting

    def setting(*args):
        found = own_setting(*args)
        paces[t.state.global_step] = found.paces
        return found

    monkeypatch.setattr(t, "training_setting", setting)
    for step, own in drawn_ranks(t, monkeypatch):
        rows.setdefault(step, []).extend(own)
    assert all(rows[step] == [4] * 8 and paces[step] == (1, 1, 1, 1) for step in range(3))
    for step in range(3, 10):
        assert sorted(rows[step]) == [1, 1, 2, 2, 4, 4, 4, 4] and paces[step] == (4, 2, 4 / 3, 1)
    assert paces_of(t.optimizer) is None  # whoever goes on with it finds it as usual


@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_the_default_mixes_the_lowest_rank_and_the_ladder_evenly(
    split, roberta_config, roberta_checkpoint, tmp_path, monkeypatch
):
    """10 updates of 8: after the eighth, two or three examples of an update at rank 1, the others at 1, 2 and 4 at
    once."""
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, n=40, num_train_epochs=2,
        per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1],
    )  # fmt: skip
    rows = {}
    for step, own in drawn_ranks(t, monkeypatch):
        rows.setdefault(step, []).extend(own)
    assert all(rows[step] == [4] * 8 for step in range(8))
    lowest, ladder = [1, 0, 0, 0], pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    for step in (8, 9):
        assert sum(row == lowest for row in rows[step]) in (2, 3)
        assert all(row in (lowest, ladder) for row in rows[step]) and len(rows[step]) == 8


@pytest.mark.parametrize(
    ("scaling", "options", "share", "distribution"),
    [
        ("alpha/r", {}, 0.8, "mixed"),
        ("alpha/r", {"sampling": "step"}, 0.8, "uniform"),
        ("alpha/r", {"frozen": True}, 0.8, "uniform"),
        ("alpha/r", {"sampling": "fixed"}, 0.0, None),
        ("alpha/b", {}, 0.0, "uniform"),  # ordered at one strength, its lower ranks would run at another
        ("alpha/b", {"full_rank_share": 0.5}, 0.5, "mixed"),
    ],
)
def test_what_is_left_to_the_default(
    scaling, options, share, distribution, roberta_config, roberta_checkpoint, tmp_path
):
    facts = trainer(roberta_config, roberta_checkpoint, tmp_path, scaling=scaling, **options).training_facts()
    assert (facts["full_rank_share"], facts["distribution"]) == (share, distribution)


def ordered_layers(model):
    """How many layers have orthogonal rows in lora_A, as ``order_components`` leaves them."""
    rows = [layer.lora_A.detach() for _, layer in lora.model.lora_layers(model)]
    return sum(torch.allclose(A @ A.T, (A @ A.T).diagonal().diag(), atol=1e-5) for A in rows)


def test_a_best_model_of_the_full_rank_part_is_ordered(roberta_config, roberta_checkpoint, tmp_path):
    """Its checkpoint was written before the components were ordered."""
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, n=16, num_train_epochs=4, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="mean_earliest", greater_is_better=True,
    )  # fmt: skip
    evaluations = iter(range(99, 0, -1))
    t.compute_metrics = lambda prediction: {"earliest": next(evaluations)}
    t.train()
    assert t.state.best_global_step == 2 and ordered_layers(t.model) == 4
    lora.load_adapter(t.model, tmp_path / "checkpoint-2")
    assert ordered_layers(t.model) == 0


def test_a_resumed_run_orders_where_its_checkpoint_did_not(roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    """Also where fewer epochs than before put the checkpoint past the first part."""
    ordered = []
    monkeypatch.setattr(
        "loralib.setting.order_components", lambda model, optimizer: ordered.append(t.state.global_step)
    )
    options = dict(n=16, save_strategy="epoch", full_rank_share=0.5)  # two updates an epoch
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, num_train_epochs=10, **options)
    t.train()
    for checkpoint, epochs in ((8, 5), (8, 10), (12, 10)):
        t = trainer(roberta_config, roberta_checkpoint, tmp_path, num_train_epochs=epochs, **options)
        t.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert ordered == [10, 8, 10]


def test_the_last_update_is_never_left_out_of_the_ordered_part(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, max_steps=5, full_rank_share=0.95, learning_rate=0.0)
    t.train()
    assert t.bound.full_steps == 4 and ordered_layers(t.model) == 4


def test_the_full_rank_part_is_plain_lora(roberta_config, roberta_checkpoint, tmp_path):
    options = dict(num_train_epochs=4)
    plain = log(trainer(roberta_config, roberta_checkpoint, tmp_path, sampling="fixed", **options))
    ours = log(trainer(roberta_config, roberta_checkpoint, tmp_path, full_rank_share=0.5, **options))
    assert len(ours) == 12 and np.allclose(ours[:6], plain[:6], rtol=1e-3) and not np.allclose(ours[6:], plain[6:])


def test_frozen_training_moves_only_what_was_drawn(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(
        roberta_config,
        roberta_checkpoint,
        tmp_path,
        sampling="step",
        frozen=True,
        full_rank_share=0,
        weight_decay=0.1,
    )
    before = t.model.roberta.encoder.layer[0].attention.self.query.lora_A.detach().clone()
    t.train()
    ranks = {t.bound.sampler()(step, 0) for step in range(3)}
    after = t.model.roberta.encoder.layer[0].attention.self.query.lora_A
    assert {j + 1 for j in range(4) if not torch.equal(after[j], before[j])} == ranks


@pytest.mark.parametrize(
    "stop", [3, 2, 4, 6], ids=["at the end of an epoch", "within one", "before components are ordered", "after"]
)
def test_resuming_ends_where_the_uninterrupted_run_ends(stop, roberta_config, roberta_checkpoint, tmp_path):
    config = type(roberta_config).from_dict(roberta_config.to_dict() | {"hidden_dropout_prob": 0.1})
    options = dict(
        num_train_epochs=3,
        save_strategy="steps",
        save_steps=stop,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    whole = trainer(config, roberta_checkpoint, tmp_path / "whole", eval_strategy="epoch", **options)
    whole.train()
    again = trainer(config, roberta_checkpoint, tmp_path / "again", eval_strategy="epoch", **options)
    for parameter in again.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()  # all comes from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


OTHER_OPTIMIZERS = ["schedule_free_adamw", "adamw_bnb_8bit", "adafactor", "ademamix"]


def test_an_optimizer_that_knows_no_paces_is_refused_at_once(roberta_config, roberta_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"take another, or paced=False \(--lora_paced False\)"):
        trainer(roberta_config, roberta_checkpoint, tmp_path, optim="schedule_free_adamw", distribution="halving")


@pytest.mark.parametrize("optimizer", OTHER_OPTIMIZERS)
def test_what_is_saved_is_what_is_measured_whatever_the_optimizer(
    optimizer, roberta_config, roberta_checkpoint, tmp_path
):
    """A schedule-free optimizer trains other values than it is measured at."""
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, optim=optimizer, full_rank_share=0.5)
    t.train()
    with torch.no_grad(), lora.use_rank(t.model, 2):
        logits = t.model(**t.data_collator([{"input_ids": [1, 5, 2]}])).logits
    t.save_model()
    measured = t.evaluate()
    with torch.no_grad(), lora.use_rank(t.model, 2):
        torch.testing.assert_close(t.model(**t.data_collator([{"input_ids": [1, 5, 2]}])).logits, logits)
    again = trainer(roberta_config, roberta_checkpoint, tmp_path / "again")
    lora.load_adapter(again.model, tmp_path)
    found = again.evaluate()
    for b in (1, 2, 3, 4):
        assert found[f"eval_r{b}_loss"] == pytest.approx(measured[f"eval_r{b}_loss"], rel=1e-5)


@pytest.mark.parametrize("optimizer", OTHER_OPTIMIZERS)
def test_other_optimizers_resume_where_they_were(optimizer, roberta_config, roberta_checkpoint, tmp_path):
    options = dict(
        optim=optimizer,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=4,
        full_rank_share=0.5,
        learning_rate=1e-3,
    )
    whole = trainer(roberta_config, roberta_checkpoint, tmp_path / "whole", **options)
    whole.train()
    again = trainer(roberta_config, roberta_checkpoint, tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_best_model_of_a_schedule_free_training_stays_the_best(roberta_config, roberta_checkpoint, tmp_path):
    """Steps follow the last evaluation; the optimizer's second values are of these steps."""
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, optim="schedule_free_adamw", full_rank_share=0.2, max_steps=5,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    t.train()
    best = min(entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry)
    assert t.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_checkpoints_hold_the_adapter_and_the_head_alone(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, save_strategy="epoch")
    t.train()
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-3" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in key or "classifier" in key for key in file.keys())  # noqa: SIM118
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.parametrize("metric", ["r2_accuracy", "aurac_accuracy", "mean_accuracy", "loss"])
def test_the_best_model_by_any_of_the_metrics(metric, roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=metric != "loss",
        full_rank_share=0.3,  # ordered in the first epoch: what is loaded is what was measured
    )  # fmt: skip
    t.train()
    history = [entry[f"eval_{metric}"] for entry in t.state.log_history if f"eval_{metric}" in entry]
    best = min(history) if metric == "loss" else max(history)
    assert t.evaluate()[f"eval_{metric}"] == pytest.approx(best)


def test_a_model_without_adapter_is_trained_as_by_trainer(roberta_config, roberta_checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    t = DyLoRATrainer(
        model=RobertaForSequenceClassification(roberta_config), args=args, train_dataset=data(9), eval_dataset=data(5),
        processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
    )  # fmt: skip
    t.train()
    metrics = t.evaluate()
    assert "eval_accuracy" in metrics and math.isfinite(metrics["eval_loss"])
    assert t.predict(data(5)).predictions.shape == (5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, "sampling"),
        ({"sampling": "fixed", "frozen": True}, "frozen"),
        ({"full_rank_share": 1.0}, "full_rank_share is 1.0"),
        ({"sampling": "fixed", "full_rank_share": 0.5}, "full_rank_share is 0.5"),
        ({"sampling": "fixed", "distribution": "uniform"}, "distribution has no effect"),
        ({"sampling": "fixed", "r_min": 2}, "r_min has no effect"),
        ({"reduce": "mean"}, "reduce has no effect"),
        ({"distribution": "mixed", "sampling": "step"}, "goes with sampling='example'"),
        ({"distribution": "mixed", "frozen": True}, "trains several ranks at once"),
        ({"eval_ranks": [5]}, "rank is 5"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"eval_do_concat_batches": False}, "put in the data's order: leave it at True"),
    ],
)
def test_settings_that_contradict_each_other(options, message, roberta_config, roberta_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(roberta_config, roberta_checkpoint, tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [("is_fsdp_enabled", "FSDP1 keeps no factors"), ("is_deepspeed_enabled", "give full_rank_share=0")],
)
def test_factors_that_cannot_be_ordered(name, message, roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    create = DyLoRATrainer.create_accelerator_and_postprocess

    def create_sharded(self):
        create(self)
        setattr(self, name, True)

    monkeypatch.setattr(DyLoRATrainer, "create_accelerator_and_postprocess", create_sharded)
    with pytest.raises(ValueError, match=message):
        trainer(roberta_config, roberta_checkpoint, tmp_path)


def test_zero_3_is_refused(roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("loralib.training.refusing.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO stage 3 keeps no whole factors"):
        trainer(roberta_config, roberta_checkpoint, tmp_path, full_rank_share=0)


def test_fsdp_on_a_cpu_is_refused_and_not_left_out(roberta_config, roberta_checkpoint, tmp_path, monkeypatch):
    # transformers asks for several processes first, and goes on without FSDP then.
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    with mock.patch.dict(os.environ), pytest.raises(ValueError, match="FSDP needs GPUs"):  # it sets some
        trainer(roberta_config, roberta_checkpoint, tmp_path, fsdp="full_shard")


def test_resuming_and_evaluating_change_nothing_in_the_real_model(roberta_checkpoint, roberta_config, tmp_path):
    """The overlay runs its last layer for the first token alone, with other dropout masks: through evaluations too."""
    from transformers_dylora.models.roberta import RobertaForSequenceClassification as Overlay

    config = type(roberta_config).from_dict(roberta_config.to_dict() | {"hidden_dropout_prob": 0.1})
    config.apply_lora, config.lora_r, config.lora_alpha = True, 4, 8

    def run(output, **options):
        t = trainer(roberta_config, roberta_checkpoint, output, num_train_epochs=2, **options)
        torch.manual_seed(0)
        model = Overlay(config)
        lora.mark_only_lora_as_trainable(model)
        tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
        return DyLoRATrainer(
            model=model, args=t.args, train_dataset=data(22), eval_dataset=data(13, 1), processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
        )  # fmt: skip

    whole = run(tmp_path / "whole", eval_strategy="epoch", save_strategy="epoch")
    whole.train()
    again = run(tmp_path / "again", eval_strategy="epoch")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    quiet = run(tmp_path / "quiet")
    quiet.train()
    for other in (again, quiet):
        assert all(torch.equal(v, other.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    assert not whole.model.roberta.encoder.layer[-1].first_token_only


def test_frozen_training_under_the_users_own_optimizer(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, sampling="step", frozen=True, full_rank_share=0)
    parameters = [p for p in t.model.parameters() if p.requires_grad]
    t.optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    before = t.model.roberta.encoder.layer[0].attention.self.query.lora_A.detach().clone()
    t.train()
    after = t.model.roberta.encoder.layer[0].attention.self.query.lora_A
    drawn = {t.bound.sampler()(step, 0) for step in range(3)}
    assert {j + 1 for j in range(4) if not torch.equal(after[j], before[j])} == drawn


def test_dropping_the_last_training_batch_measures_all(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)
    t.train()
    assert t.state.global_step == 2 and t.predict(t.eval_dataset).predictions.shape[0] == 13


def test_bf16_holds_the_frozen_weights_so_while_it_works_and_gives_them_back(
    roberta_config, roberta_checkpoint, tmp_path, monkeypatch
):
    """Losses, adapter and logits are those of the same run without it, to the bit."""
    runs = []
    for held in (True, False):
        if not held:
            monkeypatch.setattr("loralib.training.around.frozen_weights_in", lambda *_: contextlib.nullcontext())
        t = trainer(roberta_config, roberta_checkpoint, tmp_path, bf16=True)
        weight = t.model.roberta.encoder.layer[0].intermediate.dense.weight
        seen = []
        forward = t.model.forward
        t.model.forward = lambda *args, seen=seen, t=t, forward=forward, **kwargs: (
            seen.append(t.model.roberta.encoder.layer[0].intermediate.dense.weight.dtype) or forward(*args, **kwargs)
        )
        t._set_signature_columns_if_needed = lambda: None
        t._signature_columns = ["input_ids", "attention_mask", "labels"]
        losses = log(t)
        logits = t.predict(t.eval_dataset).predictions
        assert seen[0] == torch.float32 and (torch.bfloat16 in seen) == held  # in the first pass it is seen what runs
        assert t.model.roberta.encoder.layer[0].intermediate.dense.weight is weight and weight.dtype == torch.float32
        runs.append((losses, logits, [p.detach().clone() for p in t.model.parameters()]))
    assert runs[0][0] == runs[1][0] and np.array_equal(runs[0][1], runs[1][1])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


class Stream(torch.utils.data.IterableDataset):
    """The rows of a data set, without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter([{k: v for k, v in row.items() if k != "row"} for row in self.rows])


def test_a_stream_is_trained_on_and_evaluated(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, max_steps=3)
    wanted = t.evaluate()
    found = t.evaluate(Stream(t.eval_dataset))
    assert all(found[k] == pytest.approx(v, abs=1e-5) for k, v in wanted.items() if "accuracy" in k or "loss" in k)
    t.train_dataset = Stream(t.train_dataset)
    assert len(log(t)) == 3


def test_the_training_loader_has_trainers_own_settings(roberta_config, roberta_checkpoint, tmp_path):
    options = dict(
        dataloader_num_workers=1, dataloader_prefetch_factor=3, dataloader_persistent_workers=True, dataloader_in_order=False,
        dataloader_multiprocessing_context="spawn", dataloader_pin_memory=False,
    )  # fmt: skip
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, **options)
    stock = Trainer(model=t.model, args=t.args, train_dataset=t.train_dataset, data_collator=t.data_collator)
    ours, theirs = t.get_train_dataloader(), stock.get_train_dataloader()
    for name in ("num_workers", "prefetch_factor", "persistent_workers", "in_order", "pin_memory"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.multiprocessing_context.get_start_method() == "spawn"
    assert ours.worker_init_fn.func is theirs.worker_init_fn.func  # seeds the workers
    assert ours.dataset.column_names == theirs.dataset.column_names
    assert list(ours.batch_sampler) == list(t.batches())


class Loss(torch.nn.Module):
    """A model whose forward takes anything, as most of transformers' do, and whose loss divides by num_items_in_batch or not."""

    def __init__(self, divides):
        super().__init__()
        self.query, self.divides, self.asked = torch.nn.Linear(1, 3), divides, 0

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        self.asked += num_items_in_batch is not None and not torch.is_grad_enabled() and self.training is False
        logits = self.query(input_ids[:, :1].float() / 100)
        reduction = "sum" if self.divides and num_items_in_batch is not None else "mean"
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)
        return {"loss": loss / num_items_in_batch if reduction == "sum" else loss, "logits": logits}


@pytest.mark.parametrize("divides", [True, False])
def test_the_model_is_asked_whether_its_loss_divides_by_the_items(
    divides, roberta_config, roberta_checkpoint, tmp_path
):
    """... and either way an update gives the same however it is split. Its source is not read: it may say anything."""
    runs = []
    for size in (8, 2):
        t = trainer(
            roberta_config,
            roberta_checkpoint,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        torch.manual_seed(0)
        model = lora.inject(Loss(divides), ["query"], r=2)
        torch.nn.init.normal_(model.query.lora_B)
        lora.declare_layout(model, 0)  # or it would be asked for that
        lora.mark_only_lora_as_trainable(model)
        u = DyLoRATrainer(model=model, args=t.args, train_dataset=t.train_dataset, data_collator=t.data_collator)
        runs.append(log(u))
        assert u.model_accepts_loss_kwargs == divides and model.asked == 2  # one batch, with 1 item and with 2
    assert np.allclose(runs[0], runs[1], rtol=2e-4)


def test_checkpointing_under_the_trainer_is_exact_though_ranks_change_within_the_loss(
    roberta_config, roberta_checkpoint, tmp_path
):
    class TwoPasses(DyLoRATrainer):
        """Adds the loss of a second pass at another rank, which is over before the backward pass."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            with lora.use_rank(self.model, 1):
                loss = loss + super().compute_loss(model, inputs, False, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    runs = []
    for checkpointing in (False, True):
        t = trainer(roberta_config, roberta_checkpoint, tmp_path, gradient_checkpointing=checkpointing)
        u = TwoPasses(model=t.model, args=t.args, train_dataset=t.train_dataset, data_collator=t.data_collator)
        runs.append(log(u))
    assert np.allclose(runs[0], runs[1], rtol=1e-5)


def test_reentrant_checkpointing_is_refused(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    with pytest.raises(ValueError, match="leave out use_reentrant"):
        t.train()
    assert "activation_checkpointing_enable" not in vars(t.model)


def test_a_precision_that_autocast_does_not_use_rounds_nothing(roberta_config, roberta_checkpoint, tmp_path):
    """fp16 on a CPU: accelerate turns autocast off there, so the frozen weights must stay as they are."""
    named = trainer(roberta_config, roberta_checkpoint, tmp_path, fp16=True)
    plain = trainer(roberta_config, roberta_checkpoint, tmp_path)
    seen = set()
    weight_of = lambda: named.model.roberta.encoder.layer[0].intermediate.dense.weight.dtype  # noqa: E731
    named.model.register_forward_pre_hook(lambda *_: seen.add(weight_of()))
    assert np.allclose(log(named), log(plain), rtol=1e-3) and seen == {torch.float32}


def test_a_training_that_is_stopped_early_is_ordered_and_says_so(roberta_config, roberta_checkpoint, tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = True

    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="r4_loss", greater_is_better=False,
    )  # fmt: skip
    t.add_callback(Stop())
    t.train()
    t.save_model()
    facts = json.loads((tmp_path / "dylora.json").read_text())
    assert facts["ordered"] is True and facts["cut_short"] is True
    cut_adapter(tmp_path, tmp_path / "cut", 1)
