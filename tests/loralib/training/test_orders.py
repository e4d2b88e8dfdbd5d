"""Examples in another order than the trainer's own: samplers and loaders of a subclass, epochs that end early, columns
that are no lengths. What is compared with is what the order says, or a sentence."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer, TrainerCallback

from loralib.layout import examples_in
from loralib.trainer import DyLoRAMixin, DyLoRATrainer
from loralib.training.batching import lengths_of

from .test_trainer import data, trainer


def watched(kind):
    """A class that keeps the rows that it trains on, and how large it takes each update for."""

    class Watched(kind):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, {**inputs}, num_items_in_batch)
            self.__dict__.setdefault("rows", []).append(sorted(map(tuple, inputs["input_ids"].tolist())))
            self.__dict__.setdefault("sizes", []).append((examples_in(inputs), self.place.size(examples_in(inputs))))
            return loss

    return Watched


def made(kind, roberta_config, roberta_checkpoint, out, **options):
    t = trainer(roberta_config, roberta_checkpoint, out, **options)
    t.__class__ = kind
    return t


class StopEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = state.global_step == 1


@pytest.mark.parametrize("resume", [False, True])
def test_an_epoch_that_a_callback_ends_leaves_the_next_one_whole(resume, roberta_config, roberta_checkpoint, tmp_path):
    options = dict(num_train_epochs=3, save_strategy="steps", save_steps=2)
    t = made(watched(DyLoRATrainer), roberta_config, roberta_checkpoint, tmp_path, **options)
    t.add_callback(StopEpoch())
    t.train()
    if resume:  # Trainer takes checkpoint-2 for the end of the first epoch's second update, and goes on with its third
        t = made(watched(DyLoRATrainer), roberta_config, roberta_checkpoint, tmp_path, **options)
        t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert t.sizes == [(6, 6), *[(8, 8), (8, 8), (6, 6)] * 2]
    else:
        assert t.sizes == [(8, 8), *[(8, 8), (8, 8), (6, 6)] * 2]


class Drawn(DyLoRATrainer):
    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0] + [0.0] * 21, 22)


class OfOne(Trainer):
    def get_train_dataloader(self):
        examples, sampler = self.train_dataset.remove_columns("row"), Drawn._get_train_sampler(self)
        return self.accelerator.prepare(
            DataLoader(examples, batch_size=8, sampler=sampler, collate_fn=self.data_collator)
        )


class Before(DyLoRAMixin, OfOne):
    pass


class OfSampler(Trainer):
    _get_train_sampler = Drawn._get_train_sampler


class BeforeSampler(DyLoRAMixin, OfSampler):
    pass


@pytest.mark.parametrize("kind", [Drawn, Before, BeforeSampler])
def test_a_subclass_draws_its_examples_itself(kind, roberta_config, roberta_checkpoint, tmp_path):
    t = made(watched(kind), roberta_config, roberta_checkpoint, tmp_path, full_rank_share=0.5)
    t.train()
    first = [tuple(t.train_dataset[0]["input_ids"])]
    assert t.rows == [first * 8, first * 8, first * 6] and t.ordered
    assert t.sizes == [(8, 8), (8, 8), (6, 6)]


def test_an_evaluation_takes_the_sampler_of_a_base_class(roberta_config, roberta_checkpoint, tmp_path):
    class First(Trainer):
        def _get_eval_sampler(self, eval_dataset):
            return torch.utils.data.SubsetRandomSampler([3])

    class Measured(DyLoRAMixin, First):
        pass

    t = made(Measured, roberta_config, roberta_checkpoint, tmp_path)
    alone = trainer(roberta_config, roberta_checkpoint, tmp_path)
    assert t.evaluate()["eval_r2_loss"] == pytest.approx(
        alone.evaluate(data(13, 1).select([3]))["eval_r2_loss"], rel=1e-5
    )


def test_a_trainer_that_makes_its_own_examples_is_refused(roberta_config, roberta_checkpoint, tmp_path):
    from trl import GRPOTrainer

    class Ranked(DyLoRAMixin, GRPOTrainer):
        pass

    with pytest.raises(ValueError, match=r"GRPOTrainer makes what it trains on.*order_components"):
        Ranked(model=torch.nn.Linear(2, 2), reward_funcs=len)


def test_a_column_of_texts_called_length_is_not_taken_for_lengths(roberta_config, roberta_checkpoint, tmp_path):
    t = made(watched(DyLoRATrainer), roberta_config, roberta_checkpoint, tmp_path)
    usual = made(watched(DyLoRATrainer), roberta_config, roberta_checkpoint, tmp_path)
    t.train_dataset = t.train_dataset.add_column("length", ["long", "short"] * 11)
    t.train()
    usual.train()
    assert t.rows == usual.rows


@pytest.mark.parametrize("values", [["long"] * 22, [0.5] * 22, [-1] * 22])
def test_a_named_column_that_is_no_lengths_is_refused(values, roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, length_column_name="size")
    t.train_dataset = t.train_dataset.add_column("size", values)
    with pytest.raises(ValueError, match=f"column 'size' holds {values[0]!r}; .*whole numbers"):
        t.train()


def test_a_collator_that_makes_pairs_of_examples_asks_for_a_rank_per_step(roberta_config, roberta_checkpoint, tmp_path):
    def twice(collate):
        return lambda rows: {name: torch.cat([value, value]) for name, value in collate(rows).items()}

    t = trainer(roberta_config, roberta_checkpoint, tmp_path)
    t.data_collator = twice(t.data_collator)
    with pytest.raises(ValueError, match=r"A batch has 16 rows for 8 examples, .*RankSchedule\(sampling='step'\)"):
        t.train()
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, sampling="step")
    t.data_collator = twice(t.data_collator)
    t.train()
    assert t.ordered


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
def test_lengths_are_numbers_of_any_library(kind):
    held = datasets.Dataset.from_dict({"size": [3, 1, 2], "input_ids": [[1]] * 3}).with_format(kind)
    assert lengths_of(held, "size") == [3, 1, 2]


class Own(Trainer):
    """A step of one's own: the logits with their signs turned, and a loss of 1."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.tensor(1.0), -logits, inputs["labels"]


def test_an_evaluation_step_of_ones_own_runs_after_the_mixin_alone(roberta_config, roberta_checkpoint, tmp_path):
    class After(DyLoRAMixin, Own):
        pass

    class InFront(Own, DyLoRATrainer):
        pass

    t = made(After, roberta_config, roberta_checkpoint, tmp_path)
    usual = trainer(roberta_config, roberta_checkpoint, tmp_path)
    turned, logits = (one.predict(one.eval_dataset).predictions for one in (t, usual))
    torch.testing.assert_close(torch.tensor(turned), -torch.tensor(logits))
    assert t.evaluate()["eval_r2_loss"] == 1.0
    with pytest.raises(ValueError, match=r"prediction_step left ndarray, of one rank: .* after the mixin"):
        made(InFront, roberta_config, roberta_checkpoint, tmp_path).evaluate()
