"""The loss of a rank, and the weight of a micro-batch, whatever makes the loss."""

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

import loralib as lora
from loralib.trainer import DyLoRATrainer

from .test_trainer import log, trainer


def weighted_loss(outputs, labels, num_items_in_batch=None):
    """One that pays no heed to the number of items."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, torch.tensor([0.2, 1.0, 3.0]))


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.3}, {"loss": weighted_loss}, {"softmax": True}])
@pytest.mark.parametrize("with_metrics", [True, False])
def test_the_loss_of_a_rank_is_that_of_stock_trainer_there(
    with_metrics, options, roberta_config, roberta_checkpoint, tmp_path
):
    options = dict(options)
    loss, softmax = options.pop("loss", None), options.pop("softmax", False)
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, per_device_eval_batch_size=13, sampling="example",
        **({} if with_metrics else {"compute_metrics": None}), **options,
    )  # fmt: skip
    t.compute_loss_func = loss
    if softmax:
        t.preprocess_logits_for_metrics = lambda logits, labels: logits.softmax(-1)
    found = t.evaluate()
    stock = Trainer(
        model=t.model, args=t.args, eval_dataset=t.eval_dataset, data_collator=t.data_collator, compute_loss_func=loss
    )
    for rank in (1, 2, 4):
        with lora.use_rank(t.model, rank):
            assert found[f"eval_r{rank}_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-4)


def test_the_loss_of_a_batch_with_uncounted_labels_is_the_models(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, per_device_eval_batch_size=4, sampling="example")
    rows = [row | {"labels": -100 if i % 3 == 0 else row["labels"]} for i, row in enumerate(t.eval_dataset)]
    found = t.evaluate(datasets.Dataset.from_list(rows))
    batch = t.data_collator([{k: v for k, v in row.items() if k != "row"} for row in rows])
    with torch.no_grad(), lora.use_rank(t.model.eval(), 2):
        assert found["eval_r2_loss"] == pytest.approx(t.model(**batch).loss.item(), rel=1e-4)


def test_metrics_that_are_no_numbers_stand_for_each_rank(roberta_config, roberta_checkpoint, tmp_path):
    def tables(prediction):
        classes = sorted(set(prediction.predictions.argmax(-1).tolist()))
        return {"table": {"a": [1, 2]}, "list": [1], **{f"recall_{k}": 0.5 for k in classes}, "score": 0.25}

    found = trainer(roberta_config, roberta_checkpoint, tmp_path, compute_metrics=tables).evaluate()
    assert found["eval_r2_table"] == {"a": [1, 2]} and "eval_mean_table" not in found
    assert found["eval_mean_score"] == found["eval_aurac_score"] == 0.25


@pytest.mark.parametrize("splits", [(8, 1), (4, 2), (2, 4)])
def test_a_loss_function_that_pays_no_heed_to_items_is_weighed_alike(
    splits, roberta_config, roberta_checkpoint, tmp_path
):
    size, accumulate = splits
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, n=8, sampling="fixed", learning_rate=0.0,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    t.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: torch.nn.functional.cross_entropy(
        outputs.logits, labels
    )
    ((loss, norm),) = log(t)
    plain = trainer(roberta_config, roberta_checkpoint, tmp_path, n=8, sampling="fixed", learning_rate=0.0)
    ((wanted, wanted_norm),) = log(plain)
    assert loss == pytest.approx(wanted, rel=1e-3) and norm == pytest.approx(wanted_norm, rel=1e-3)


@pytest.mark.parametrize("splits", [(4, 2), (2, 4)])
def test_a_model_that_divides_by_items_that_nobody_counts_is_weighed_alike(splits, tmp_path):
    """A question answerer has no ``labels``, of which Trainer counts the items."""
    from transformers import LlamaConfig, LlamaForQuestionAnswering

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = lora.inject(LlamaForQuestionAnswering(config), ["q_proj"], r=4)
    lora.mark_only_lora_as_trainable(model)
    rows = [{"input_ids": [5 + i, 6, 7, 8], "start_positions": i % 4, "end_positions": 3} for i in range(8)]

    def run(size, accumulate):
        args = TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, learning_rate=0.0, max_steps=1,
        )  # fmt: skip
        return log(
            DyLoRATrainer(
                model=model,
                args=args,
                train_dataset=datasets.Dataset.from_list(rows),
                schedule=lora.RankSchedule("fixed"),
            )
        )

    assert run(*splits)[0] == pytest.approx(run(8, 1)[0], rel=1e-3)
