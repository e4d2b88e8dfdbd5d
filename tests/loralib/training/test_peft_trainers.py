"""A model of PEFT's under Trainer and TRL: ranks are drawn, measured, saved, gone on with, and exported."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import loralib as lora
from loralib.cli import main
from loralib.peft import DyLoraConfig
from loralib.trainer import DyLoRAMixin, DyLoRATrainer

from .test_trackers import accuracy, data
from .test_trl import rows

pytestmark = pytest.mark.slow


def classifier(checkpoint, peft=True):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    torch.manual_seed(1)
    if peft:
        return get_peft_model(
            model, DyLoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        )
    lora.inject(model, ["query", "value"], r=4, lora_alpha=8)
    lora.mark_only_lora_as_trainable(model)
    return model


def trainer(checkpoint, out, model, **settings):
    options = {"report_to": "none", "use_cpu": True, "num_train_epochs": 4, "per_device_train_batch_size": 4,
               "eval_strategy": "epoch", "save_strategy": "epoch", "disable_tqdm": True, "learning_rate": 1e-2}  # fmt: skip
    return DyLoRATrainer(
        model=model,
        args=TrainingArguments(str(out), **(options | settings)),
        train_dataset=data(),
        eval_dataset=data(8),
        compute_metrics=accuracy,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(checkpoint)),
    )


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_trainer_trains_measures_saves_and_goes_on(roberta_checkpoint, tmp_path):
    own = trainer(roberta_checkpoint, tmp_path / "out", classifier(roberta_checkpoint))
    before = factors(own.model)
    own.train()
    assert own.ordered and lora.get_rank(own.model) == 4
    assert all(not torch.equal(before[name], value) for name, value in factors(own.model).items())
    logged = [entry for entry in own.state.log_history if "eval_r1_accuracy" in entry]
    assert len(logged) == 4 and "eval_aurac_accuracy" in logged[-1]
    again = trainer(roberta_checkpoint, tmp_path / "again", classifier(roberta_checkpoint))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    for name, value in factors(own.model).items():
        torch.testing.assert_close(factors(again.model)[name], value, atol=1e-6, rtol=1e-5)


def test_the_best_checkpoint_is_loaded(roberta_checkpoint, tmp_path):
    own = trainer(
        roberta_checkpoint, tmp_path / "out", classifier(roberta_checkpoint), load_best_model_at_end=True,
        metric_for_best_model="eval_r4_loss", greater_is_better=False,
    )  # fmt: skip
    own.train()
    found = own.evaluate()
    assert found["eval_r4_loss"] == pytest.approx(own.state.best_metric, rel=1e-4)


def test_measure_select_and_export_as_after_any_training(roberta_checkpoint, tmp_path, capsys):
    own = trainer(roberta_checkpoint, tmp_path / "out", classifier(roberta_checkpoint), save_strategy="no")
    own.train()
    results = own.measure_ranks()
    assert [row.rank for row in results.splits["validation"]] == [1, 2, 3, 4]
    assert main(["export", str(tmp_path / "out"), "--rank", "2", "--to", str(tmp_path / "two")]) == 0
    stock = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=3)
    stock = PeftModel.from_pretrained(stock, tmp_path / "two").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), lora.use_rank(own.model.eval(), 2):
        torch.testing.assert_close(stock(input_ids=ids).logits, own.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    # the same adapter in a model without PEFT
    other = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=3)
    lora.load_adapter(other, tmp_path / "out")
    with torch.no_grad(), lora.use_rank(own.model, 3), lora.use_rank(other.eval(), 3):
        torch.testing.assert_close(other(ids).logits, own.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


class LanguageTrainer(DyLoRAMixin, SFTTrainer):
    pass


def test_trl_trains_it(llama_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_checkpoint)
    config = DyLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    own = LanguageTrainer(
        model=get_peft_model(model, config),
        args=SFTConfig(
            str(tmp_path / "out"), report_to="none", use_cpu=True, num_train_epochs=2, per_device_train_batch_size=4,
            disable_tqdm=True, learning_rate=1e-2, save_strategy="epoch", dataset_num_proc=None,
        ),
        train_dataset=rows(16, 0),
        eval_dataset=rows(8, 1),
        processing_class=AutoTokenizer.from_pretrained(llama_checkpoint),
    )  # fmt: skip
    own.train()
    assert own.ordered and lora.get_rank(own.model) == 4
    results = own.measure_ranks()
    assert results.metric == "loss" and len(results.splits["validation"]) == 4
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert stored["r"] == 4 and (tmp_path / "out" / "dylora.json").exists()


def test_a_plain_adapter_that_trains_beside_is_refused(roberta_checkpoint, tmp_path):
    t = trainer(roberta_checkpoint, tmp_path, classifier(roberta_checkpoint))
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint),
        DyLoraConfig(r=4, target_modules=["query"]),
    )
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["key"]))
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(ValueError, match="'plain' trains beside the one with ranks, and checkpoints hold the latter"):
        type(t)(model=model, args=t.args, train_dataset=t.train_dataset, eval_dataset=t.eval_dataset)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".plain." not in name)
    type(t)(model=model, args=t.args, train_dataset=t.train_dataset, eval_dataset=t.eval_dataset)
