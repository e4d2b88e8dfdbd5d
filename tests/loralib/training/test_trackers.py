"""Trackers and searches: the scores of all ranks reach TensorBoard and Weights & Biases, a search goes by aurac_..."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainingArguments

import loralib as lora
from loralib.trainer import DyLoRATrainer

pytestmark = pytest.mark.slow
WANTED = {f"eval/r{b}_accuracy" for b in (1, 2, 3)} | {"eval/mean_accuracy", "eval/aurac_accuracy", "eval/r1_loss"}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def data(n=16):
    draw = np.random.default_rng(0)
    words = draw.integers(4, 100, (n, 8)).tolist()
    return Dataset.from_dict({"input_ids": words, "labels": [row[0] % 3 for row in words]})


def adapted(checkpoint, r=3):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    lora.inject(model, ["query", "value"], r=r)
    lora.mark_only_lora_as_trainable(model)
    return model


def trainer(checkpoint, out, **options):
    from transformers import AutoTokenizer

    settings = {"report_to": "none", "use_cpu": True, "num_train_epochs": 2, "per_device_train_batch_size": 4,
                "eval_strategy": "epoch", "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    settings |= {name: options.pop(name) for name in list(options) if name in settings or name == "run_name"}
    return DyLoRATrainer(
        args=TrainingArguments(str(out), **settings),
        train_dataset=data(),
        eval_dataset=data(8),
        compute_metrics=accuracy,
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(checkpoint)),
        **({"model": adapted(checkpoint)} | options),
    )


def test_tensorboard_has_every_ranks_scores_in_one_group(roberta_checkpoint, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    own = trainer(roberta_checkpoint, tmp_path / "out", report_to="tensorboard")
    own.train()
    (directory,) = {file.parent for file in Path(tmp_path / "log").rglob("events*")}
    events = EventAccumulator(str(directory))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= WANTED
    logged = [entry for entry in own.state.log_history if "eval_r2_accuracy" in entry]
    told = [(event.step, event.value) for event in events.Scalars("eval/r2_accuracy")]
    assert told == [(entry["step"], pytest.approx(entry["eval_r2_accuracy"])) for entry in logged] and len(told) == 2


def test_weights_and_biases_has_them_offline(roberta_checkpoint, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    own = trainer(roberta_checkpoint, tmp_path / "out", report_to="wandb", run_name="test")
    own.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert set(summary) >= WANTED
    last = [entry for entry in own.state.log_history if "eval_r2_accuracy" in entry][-1]
    assert summary["eval/r2_accuracy"] == pytest.approx(last["eval_r2_accuracy"])


def test_a_search_of_rates_goes_by_the_area_under_the_curve(roberta_checkpoint, tmp_path):
    found, models = [], []

    def objective(metrics):
        found.append(metrics["eval_aurac_accuracy"])
        return found[-1]

    def fresh(trial=None):
        torch.manual_seed(0)
        models.append(adapted(roberta_checkpoint, r=3 if trial is None else trial.suggest_int("r", 2, 3)))
        return models[-1]

    own = trainer(roberta_checkpoint, tmp_path / "out", model=None, model_init=fresh)
    best = own.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-5, 3e-2])},
        compute_objective=objective,
        direction="maximize",
        backend="optuna",
        n_trials=3,
    )
    assert best.objective == max(found) and "learning_rate" in best.hyperparameters
    # each trial is a training of its own, of its own r_max: the components are ordered in each, and it ends at r_max
    r_max = lora.max_rank(models[-1])  # transformers lets go of it
    assert own.ordered and lora.get_rank(models[-1]) == r_max == own.bound.r_max == own.eval_ranks[-1]
    torch.manual_seed(0)
    again = trainer(roberta_checkpoint, tmp_path / "again", model=adapted(roberta_checkpoint, r_max))
    again.args.learning_rate = own.args.learning_rate
    again.train()
    for (name, one), (_, other) in zip(models[-1].named_parameters(), again.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
