"""After any training ``measure_ranks`` leaves what the dylora command reads."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import loralib as lora
from loralib.cli import main
from loralib.report.results import RankResults
from loralib.report.scores import decide
from loralib.trainer import DyLoRATrainer

from .test_tasks import collate, prepared
from .test_trainer import trainer

pytestmark = pytest.mark.slow


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()), "odd": 3.5}


def commands(capsys, directory: Path, to: Path) -> tuple[int, str]:
    """select, report and export --rank auto; the selected rank, and what select said."""
    assert main(["select", str(directory)]) == 0
    said = capsys.readouterr().out
    assert main(["report", str(directory), "--to", str(to / "report")]) == 0
    assert main(["export", str(directory), "--rank", "auto", "--to", str(to / "adapter")]) == 0
    rank = int(re.search(r"^rank (\d+)$", said, re.M)[1])
    assert json.loads((to / "adapter" / "dylora.json").read_text())["rank"] == rank
    return rank, said


def measured_by(compute_metrics, roberta_config, roberta_checkpoint, directory):
    """A trainer whose model's ranks differ."""
    t = trainer(roberta_config, roberta_checkpoint, directory)
    own = DyLoRATrainer(
        model=t.model, args=t.args, train_dataset=t.train_dataset, eval_dataset=t.eval_dataset, data_collator=t.data_collator,
        compute_metrics=compute_metrics,
    )  # fmt: skip
    for name, parameter in own.model.named_parameters():
        if "lora_" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return own


def test_a_classifier_with_a_data_set_of_ones_own(roberta_config, roberta_checkpoint, tmp_path, capsys):
    own = measured_by(accuracy, roberta_config, roberta_checkpoint, tmp_path / "run")
    results = own.measure_ranks(task="mine")
    assert results == RankResults.read(tmp_path / "run") and results.metric == "accuracy"
    arrays = np.load(tmp_path / "run" / "predictions_validation.npz")
    found = (decide(arrays["logits"]) == arrays["labels"][:, None]).mean(0)
    assert [row.scores["accuracy"] for row in results.splits["validation"]] == pytest.approx(found.tolist())
    rank, said = commands(capsys, tmp_path / "run", tmp_path)
    assert rank == results.selected_rank.rank and "one standard error" in said
    assert "| 350" not in ((tmp_path / "run") / "rank_results.md").read_text()  # a score on a scale of its own


def test_a_language_model_by_the_losses_of_its_examples(tmp_path, capsys):
    kind, options = prepared("causal", tmp_path / "run")
    t = kind(**options)
    results = t.measure_ranks()
    rows = results.splits["validation"]
    assert results.metric == "loss" and t.args.per_device_eval_batch_size == 3
    arrays = np.load(tmp_path / "run" / "predictions_validation.npz")
    for k, rank in enumerate((1, 2, 3, 4)):
        merged = lora.merge(options["model"], rank).eval()
        for i, example in enumerate(options["eval_dataset"]):
            with torch.no_grad():
                expected = float(merged(**collate([example])).loss)
            assert arrays["losses"][i, k] == pytest.approx(expected, rel=1e-4)
            assert arrays["weights"][i] == len(example["input_ids"]) - 1
    best = min(rows, key=lambda row: row.loss).rank
    rank, said = commands(capsys, tmp_path / "run", tmp_path)
    assert rank == results.selected_rank.rank <= best and f"(rank {best}); loss" in said


def test_an_example_without_a_token_that_counts_has_no_loss(tmp_path, capsys):
    kind, options = prepared("causal", tmp_path / "run")
    empty = {**options["eval_dataset"][0]}
    empty["labels"] = torch.full_like(torch.as_tensor(empty["labels"]), -100).tolist()
    options["eval_dataset"] = [*options["eval_dataset"], empty]
    results = kind(**options).measure_ranks()
    assert np.load(tmp_path / "run" / "predictions_validation.npz")["weights"][-1] == 0
    rank, _ = commands(capsys, tmp_path / "run", tmp_path)
    assert rank == results.selected_rank.rank and all(row.loss > 0 for row in results.splits["validation"])


def test_the_adapter_is_kept_whatever_the_choice_of_a_rank_meets(tmp_path, monkeypatch):
    kind, options = prepared("causal", tmp_path / "run")
    t = kind(**options)
    monkeypatch.setattr("loralib.training.measuring.choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        t.measure_ranks()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_several_data_sets_are_measured_one_at_a_time(tmp_path):
    kind, options = prepared("causal", tmp_path / "run")
    options["eval_dataset"] = {"a": options["eval_dataset"], "b": options["eval_dataset"]}
    with pytest.raises(ValueError, match="one at a time"):
        kind(**options).measure_ranks()


def test_outputs_that_are_no_numbers_are_not_scored():
    with pytest.raises(ValueError, match="no numbers"):
        decide(np.array([[0.0, np.nan]]))
    assert decide(np.array([[0.0, -np.inf]])).tolist() == [0]


@pytest.mark.parametrize("kind", ["macro", "percent"])
def test_a_score_that_is_counted_in_another_way_is_chosen_by_its_best(
    kind, roberta_config, roberta_checkpoint, tmp_path, capsys
):
    from sklearn.metrics import f1_score

    def macro(p):
        return {"f1": f1_score(p.label_ids, p.predictions.argmax(-1), average="macro")}

    def percent(p):
        return {"accuracy": 100 * accuracy(p)["accuracy"]}

    own = measured_by(macro if kind == "macro" else percent, roberta_config, roberta_checkpoint, tmp_path / "run")
    results = own.measure_ranks()
    _, values = results.curve("validation")
    assert results == RankResults.read(tmp_path / "run") and "standard error" not in results.selected_rank.rule
    assert results.selected_rank.rank == 1 + int(np.argmax(values))
    assert main(["select", str(tmp_path / "run")]) == 2 and "counted in another way" in capsys.readouterr().err
    assert main(["select", str(tmp_path / "run"), "--within", "0"]) == 0


def test_a_second_split_joins_the_first_on_which_the_rank_stays_chosen(
    roberta_config, roberta_checkpoint, tmp_path, capsys
):
    own = measured_by(accuracy, roberta_config, roberta_checkpoint, tmp_path / "run")
    first = own.measure_ranks()
    both = own.measure_ranks(own.train_dataset, split="test")
    assert both == RankResults.read(tmp_path / "run") and list(both.splits) == ["validation", "test"]
    assert both.splits["validation"] == first.splits["validation"] and both.selected_rank == first.selected_rank
    assert both.aurac.keys() == {"validation", "test"} and both.aurac["validation"] == first.aurac["validation"]
    for split in both.splits:
        assert main(["select", str(tmp_path / "run"), "--split", split]) == 0
    own.measure_ranks()
    assert RankResults.read(tmp_path / "run").splits.keys() == {"validation", "test"}
    with torch.no_grad():
        next(p for name, p in own.model.named_parameters() if "lora_B" in name).add_(0.1)
    other = own.measure_ranks(own.train_dataset, split="test")
    assert list(other.splits) == ["test"] and other.selected_rank.split == "test"  # of other weights


def test_a_metric_that_nothing_resamples_is_chosen_by_its_best(tmp_path, capsys):
    kind, options = prepared("token classification", tmp_path / "run")
    t = kind(**options, compute_metrics=lambda p: {"mine": float(p.predictions.mean())})
    results = t.measure_ranks()
    values = [row.scores["mine"] for row in results.splits["validation"]]
    assert results.selected_rank.rank == 1 + int(np.argmax(values))
    assert main(["select", str(tmp_path / "run")]) == 2 and "give a margin" in capsys.readouterr().err
    with pytest.raises(ValueError, match="metric is 'rouge'; the evaluation gives mine, loss"):
        t.measure_ranks(metric="rouge")


def test_a_checkpoint_of_another_schedule_is_told(roberta_config, roberta_checkpoint, tmp_path):
    first = trainer(roberta_config, roberta_checkpoint, tmp_path / "a", distribution="halving")
    first.save_model(str(tmp_path / "a"))
    with pytest.warns(UserWarning, match="another schedule: distribution was halving, now mixed"):
        trainer(roberta_config, roberta_checkpoint, tmp_path / "b")._load_from_checkpoint(str(tmp_path / "a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first._load_from_checkpoint(str(tmp_path / "a"))


def test_what_was_made_of_the_weights_before_makes_way(roberta_config, roberta_checkpoint, tmp_path):
    own = measured_by(accuracy, roberta_config, roberta_checkpoint, tmp_path / "run")
    own.measure_ranks()
    own.measure_ranks(own.train_dataset, split="test")
    (tmp_path / "run" / "rank_curve.svg").write_text("of these weights")
    own.measure_ranks()
    assert (tmp_path / "run" / "rank_curve.svg").exists()
    with torch.no_grad():
        next(p for name, p in own.model.named_parameters() if "lora_B" in name).add_(0.1)
    own.measure_ranks()
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert not {"rank_curve.svg", "predictions_test.npz"} & left and "predictions_validation.npz" in left
