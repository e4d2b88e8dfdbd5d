"""The trainer's fit_strengths: loralib.fit_strengths on its training data, and what is told of it."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    TrainingArguments,
)

import loralib as lora
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig
from loralib.trainer import DyLoRATrainer

from .test_trainer import data, trainer


def table(model):
    return torch.tensor([layer.strength_at for _, layer in lora_layers(model)])


def test_it_is_the_librarys_on_the_training_data(roberta_config, roberta_checkpoint, tmp_path):
    """A split into micro-batches changes nothing."""

    def made(name, batch=8, accumulate=1):
        return trainer(
            roberta_config, roberta_checkpoint, tmp_path / name, n=40,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        )  # fmt: skip

    whole, split, alone = made("whole"), made("split", 4, 2), made("alone")
    for each in (whole, split):
        each.fit_strengths(updates=4)
        assert each.args.per_device_eval_batch_size == 8
    batches = [dict(batch) for batch in alone.get_train_dataloader()]
    assert [len(batch["labels"]) for batch in batches] == [8] * 5
    lora.fit_strengths(alone.model, batches, updates=4)
    assert (table(alone.model) - 1).abs().max() > 0.01
    torch.testing.assert_close(table(whole.model), table(alone.model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(table(split.model), table(alone.model), rtol=1e-3, atol=1e-3)

    results = whole.measure_ranks()
    assert results.fitted and results.method.endswith("then strengths of each rank's own")
    assert results.short_name().endswith("own strengths") and type(results).read(tmp_path / "whole").fitted
    plain = made("plain").measure_ranks()
    assert not plain.fitted and "strengths" not in plain.method + plain.short_name()
    assert [row.loss for row in results.splits["validation"]] != [row.loss for row in plain.splits["validation"]]
    again = made("again").model
    lora.load_adapter(again, tmp_path / "whole")
    torch.testing.assert_close(table(again), table(whole.model), rtol=0, atol=0)


def test_it_needs_an_adapter_and_data(roberta_config, tmp_path):
    model = RobertaForSequenceClassification(roberta_config)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"no loralib layer.*call loralib.inject"):
        DyLoRATrainer(model=model, args=args, train_dataset=[{}] * 8).fit_strengths()
    lora.inject(model, ["query"], r=2)
    with pytest.raises(ValueError, match="which are None; give one dataset"):
        DyLoRATrainer(model=model, args=args).fit_strengths()


def test_a_batch_whose_labels_do_not_count_adds_nothing(roberta_config, roberta_checkpoint, tmp_path):
    """As in training: masked language modelling with batches of one."""
    torch.manual_seed(0)
    model = lora.inject(RobertaForMaskedLM(roberta_config), ["query"], r=2)
    rows = [{"input_ids": torch.arange(4, 10), "labels": torch.arange(4, 10)} for _ in range(4)]
    rows[2]["labels"] = torch.full((6,), -100)
    options = {"per_device_train_batch_size": 1, "report_to": "none", "use_cpu": True}
    masked = DyLoRATrainer(model=model, args=TrainingArguments(str(tmp_path), **options), train_dataset=rows)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    masked.fit_strengths(updates=4)
    assert torch.isfinite(table(model)).all() and (table(model) != 1).any()


def test_what_add_adapter_put_in_trains(roberta_checkpoint, tmp_path):
    """PEFT names its factors after the adapter."""
    model = RobertaForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=3)
    model.add_adapter(DyLoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "report_to": "none", "use_cpu": True}
    DyLoRATrainer(
        model=model, args=TrainingArguments(str(tmp_path), **options), train_dataset=data(16).remove_columns("row"),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(roberta_checkpoint)),
    ).train()  # fmt: skip
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").exists()


def test_other_data_serve_as_well_and_the_trainers_stay(roberta_config, roberta_checkpoint, tmp_path):
    one = trainer(roberta_config, roberta_checkpoint, tmp_path / "one")
    own, place = one.train_dataset, one.place
    one.fit_strengths(one.eval_dataset, updates=3)
    assert one.train_dataset is own and one.place is place
    other = trainer(roberta_config, roberta_checkpoint, tmp_path / "other")
    other.train_dataset = one.eval_dataset
    other.fit_strengths(updates=3)
    torch.testing.assert_close(table(one.model), table(other.model))
    one.train()  # goes on from there: in order, ranks are as the components say
    assert all(layer.strength_at is None for _, layer in lora_layers(one.model))
