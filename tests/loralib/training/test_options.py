"""Options and features of Trainer that people use: what stock Trainer does, or what a formula says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

import loralib as lora
from loralib.titles import title_of
from loralib.trainer import DyLoRATrainer

from .test_trainer import data, log, trainer

TWO = """
import json, sys
import torch, loralib as lora
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from loralib.trainer import DyLoRATrainer

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.5) if p.ndim == 2 else None
lora.inject(model, ["q_proj"], r=2)
rows = [torch.randint(1, 64, (3 + 4 * i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]

def collate(batch):
    n = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (n - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

args = TrainingArguments(sys.argv[1], use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=2)
for n in (8, 7, 5):  # the last batches of 7 and of 5 are filled up with examples that come a second time
    own = rows[:n]
    data = Dataset.from_dict({"input_ids": own, "labels": own})
    trainer = DyLoRATrainer(model=model, args=args, eval_dataset=data, data_collator=collate)
    found = trainer.evaluate()
    with torch.no_grad():
        each = [-model(torch.tensor([r])).logits[0, :-1].log_softmax(-1)[range(len(r) - 1), r[1:]].sum() for r in own]
    wanted = float(sum(each)) / sum(len(r) - 1 for r in own)
    if trainer.is_world_process_zero():
        print("FOUND", json.dumps([trainer.args.world_size, found["eval_r2_loss"], wanted]))
assert trainer.args.average_tokens_across_devices
"""


@pytest.mark.slow
def test_a_language_models_loss_in_two_processes_is_that_of_its_tokens(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.partition("FOUND ")[2] for line in done.stdout.splitlines() if "FOUND " in line]
    assert len(lines) == 3
    for size, found, wanted in map(json.loads, lines):
        assert size == 2 and found == pytest.approx(wanted, rel=1e-4)


class Stop(TrainerCallback):
    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.at


def test_a_training_that_a_callback_ends_early_is_ordered_and_says_so(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, num_train_epochs=4)
    t.add_callback(Stop(2))
    with pytest.warns(UserWarning, match="ended at update 2, before its components were to be ordered"):
        t.train()
    layer = t.model.roberta.encoder.layer[0].attention.self.query
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    torch.testing.assert_close(A @ A.T, torch.diag(torch.diagonal(A @ A.T)), rtol=1e-4, atol=1e-4)
    lengths = B.norm(dim=0)
    assert torch.equal(lengths, lengths.sort(descending=True).values) and t.training_facts() and t.ordered
    title = "LoRA trained at rank 4, cut short, its components ordered afterwards"
    assert t.measure_ranks(t.train_dataset).method == title
    assert title_of(json.loads((tmp_path / "dylora.json").read_text()), 4) == title


def test_callbacks_find_the_model_at_r_max(roberta_config, roberta_checkpoint, tmp_path):
    class Look(TrainerCallback):
        def __init__(self):
            self.seen = []

        def look(self, args, state, control, model=None, **_):
            model.eval()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[1, 5, 6, 2]])).logits
                with lora.use_rank(model, 4):
                    self.seen.append(torch.equal(logits, model(input_ids=torch.tensor([[1, 5, 6, 2]])).logits))
            model.train()

        on_epoch_end = on_evaluate = on_save = on_train_end = look

    look, options = Look(), dict(num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch")
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, full_rank_share=0, **options)
    t.add_callback(look)
    t.train()
    assert look.seen == [True] * 7


def own(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs.pop("labels")
    inputs.pop("row", None)
    outputs = model(**inputs)
    loss = cross_entropy(outputs.logits, labels)
    return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("said", [False, None])
def test_a_loss_of_a_subclass_is_divided_as_trainer_does(said, roberta_config, roberta_checkpoint, tmp_path):
    class Stock(Trainer):
        loss_is_scaled_for_ga, compute_loss = said, own

    class Ours(DyLoRATrainer):
        loss_is_scaled_for_ga, compute_loss = said, own

    found = []
    for kind in (Stock, Ours):
        made = trainer(
            roberta_config, roberta_checkpoint, tmp_path, n=8, sampling="fixed",
            per_device_train_batch_size=2, gradient_accumulation_steps=4, train_sampling_strategy="sequential",
        )  # fmt: skip
        schedule = {"schedule": lora.RankSchedule("fixed")} if kind is Ours else {}
        t = kind(
            model=made.model, args=made.args, train_dataset=made.train_dataset, data_collator=made.data_collator, **schedule
        )  # fmt: skip
        found.append(log(t))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


def test_a_loss_that_draws_is_weighed_alike(roberta_config, roberta_checkpoint, tmp_path):
    def noisy(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits + 1e-3 * torch.randn_like(outputs.logits), labels)

    found = []
    for size in (8, 2):
        made = trainer(
            roberta_config, roberta_checkpoint, tmp_path, n=8, full_rank_share=0, sampling="step",
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        made.compute_loss_func = noisy
        found.append(log(made))
        assert not made.loss_divides
    np.testing.assert_allclose(found[1], found[0], rtol=1e-2)


def test_a_batch_of_one_class_does_not_say_what_the_loss_is(roberta_config, roberta_checkpoint, tmp_path):
    def weighted(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels, torch.tensor([0.1, 5.0, 5.0]))

    t = trainer(roberta_config, roberta_checkpoint, tmp_path, per_device_eval_batch_size=4)
    t.compute_loss_func = weighted
    mixed = data(40, 1)
    zeros = [i for i, label in enumerate(mixed["labels"]) if label == 0][:4]
    rows = mixed.select([*zeros, *(i for i in range(40) if i not in zeros)])
    found = t.evaluate(rows)
    t.compute_metrics = None
    alone = t.evaluate(rows)
    for b in (1, 4):
        assert found[f"eval_r{b}_loss"] == pytest.approx(alone[f"eval_r{b}_loss"], rel=1e-5)


@pytest.mark.slow
def test_measuring_another_data_set_while_workers_persist(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    t.evaluate()
    rows = t.measure_ranks(data(21, 7), split="test").splits["test"]
    assert rows[0].samples == 21


def test_a_search_goes_by_the_areas_and_takes_its_seed(roberta_config, roberta_checkpoint, tmp_path):
    import optuna

    made = trainer(roberta_config, roberta_checkpoint, tmp_path, eval_strategy="epoch")
    build = lambda trial=None: trainer(roberta_config, roberta_checkpoint, tmp_path).model  # noqa: E731
    t = DyLoRATrainer(
        model=None, model_init=build, args=made.args, train_dataset=made.train_dataset, eval_dataset=made.eval_dataset,
        data_collator=made.data_collator, compute_metrics=made.compute_metrics, schedule=lora.RankSchedule(full_rank_share=0),
    )  # fmt: skip
    best = t.hyperparameter_search(
        hp_space=lambda trial: {"seed": trial.suggest_int("seed", 11, 11)}, direction="maximize", backend="optuna", n_trials=1,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip
    last = [entry for entry in t.state.log_history if "eval_aurac_accuracy" in entry][-1]
    assert best.objective == pytest.approx(last["eval_aurac_accuracy"])
    assert t.args.seed == 11 and t.bound.schedule.seed == 11


def test_frozen_training_under_an_optimizer_of_a_subclass(roberta_config, roberta_checkpoint, tmp_path):
    class Own(DyLoRATrainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
            return self.optimizer

    made = trainer(roberta_config, roberta_checkpoint, tmp_path)
    t = Own(
        model=made.model, args=made.args, train_dataset=made.train_dataset, data_collator=made.data_collator,
        schedule=lora.RankSchedule.paper(seed=1),
    )  # fmt: skip
    A = t.model.roberta.encoder.layer[0].attention.self.query.lora_A
    before = A.detach().clone()
    t.train()
    drawn = {t.bound.sampler()(step, 0) for step in range(t.state.global_step)}
    assert {j + 1 for j in range(4) if not torch.equal(A[j], before[j])} <= drawn < {1, 2, 3, 4}


def test_the_less_perplexity_the_better(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(
        roberta_config, roberta_checkpoint, tmp_path, metric_for_best_model="r4_perplexity", eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True,
    )  # fmt: skip
    assert t.args.greater_is_better is False


def test_what_is_pushed_in_the_middle_says_that_it_is_not_ordered(
    roberta_config, roberta_checkpoint, tmp_path, monkeypatch
):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path, num_train_epochs=4, save_strategy="epoch")
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    t.add_callback(Stop(3))
    with pytest.warns(UserWarning, match="ended at update 3"):
        t.train()
    t._push_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "dylora.json").read_text() == (tmp_path / "checkpoint-3" / "dylora.json").read_text()
    assert '"ordered": false' in (tmp_path / "dylora.json").read_text()


def test_a_stream_that_knows_its_length_is_a_stream(roberta_config, roberta_checkpoint, tmp_path):
    class Sized(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(datasets.Dataset.remove_columns(data(22), "row").to_list())

        def __len__(self):
            return 22

    t = trainer(roberta_config, roberta_checkpoint, tmp_path)
    t.train_dataset = Sized()
    t.train()
    assert t.state.global_step == 3


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_compiled_blocks_are_not_checkpointed(name, roberta_config, roberta_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="leave out torch_compile or activation_checkpointing"):
        trainer(roberta_config, roberta_checkpoint, tmp_path, torch_compile=True, **{name: True})


def test_what_no_checkpoint_would_hold_is_not_trained(roberta_config, roberta_checkpoint, tmp_path):
    t = trainer(roberta_config, roberta_checkpoint, tmp_path)
    norm = t.model.roberta.encoder.layer[0].output.LayerNorm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"LayerNorm.weight' \(one of 2\) would train, and checkpoints hold"):
        t.train()
    norm.requires_grad_(False)
    t.train()
