"""What a Trainer's users may do beside the usual: losses, data, outputs and files of their own."""

import math
import re

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import loralib as lora
from loralib.model import lora_layers
from loralib.trainer import DyLoRAMixin, DyLoRATrainer
from loralib.training.batching import lengths_of
from loralib.training.trainer import _objective

SMALL = dict(
    hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=50, pad_token_id=0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
)  # fmt: skip
PLAIN = {"schedule": lora.RankSchedule("fixed")}


def bert(kind=tf.BertForSequenceClassification):
    torch.manual_seed(0)
    model = lora.inject(kind(tf.BertConfig(**SMALL)), ["query", "value"], r=4)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    return lora.mark_only_lora_as_trainable(model) or model


def rows(n, seed=0, labels=3, low=3, high=12):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(5, 50, int(draw.integers(low, high))).tolist() for _ in range(n)]
    return [{"input_ids": text, "labels": int(sum(text) % labels)} for text in texts]


def collate(examples):
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([[*e["input_ids"], *[0] * (longest - len(e["input_ids"]))] for e in examples])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def made(kind, tmp_path, data=None, n=8, collator=collate, model=None, **more):
    schedule = PLAIN if issubclass(kind, DyLoRAMixin) and "schedule" not in more else {}
    own = {
        name: more.pop(name)
        for name in ("compute_metrics", "compute_loss_func", "eval_dataset", "schedule")
        if name in more
    }
    options = dict(
        use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, max_grad_norm=1e9
    )
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, learning_rate=0.0, **options | more)
    data = rows(n) if data is None else data
    return kind(model=model or bert(), args=args, train_dataset=data, data_collator=collator, **schedule | own)


def norms(trainer):
    trainer.train()
    return [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Discards:
    """Takes the outputs from the class behind it, and has a mean of its own for a loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class SaysMean(Discards):
    loss_is_scaled_for_ga = False


class Divides(Trainer):
    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels, outputs = inputs["labels"], model(**inputs)
        loss = cross_entropy(outputs.logits, labels)
        loss = loss / self.current_gradient_accumulation_steps if model.training else loss
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("behind", [(Discards, Trainer), (SaysMean, Trainer), (Divides,)])
@pytest.mark.parametrize("before", [True, False])
def test_a_loss_of_ones_own_weighs_each_example_alike(before, behind, tmp_path):
    """Eight examples at once, or two by two: the update is the same, whatever a class says of its loss."""
    if not before and len(behind) == 2:
        kind = type("Own", (behind[0], DyLoRATrainer), {})
    else:
        kind = type("Own", (DyLoRAMixin, *behind), {})
    one = norms(made(kind, tmp_path, per_device_train_batch_size=8))
    several = norms(made(kind, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    uneven = norms(made(kind, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3))
    np.testing.assert_allclose(several, one, rtol=2e-3)
    if behind != (Divides,):  # which divides by three parts of unlike size
        np.testing.assert_allclose(uneven, one, rtol=2e-3)


class Looks(Trainer):
    """Has a step of its own, which wants the outputs beside the loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss, outputs = self.compute_loss(
            model, self._prepare_inputs(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        assert outputs.logits.requires_grad
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_of_a_base_class_gets_the_outputs_beside_the_weighed_loss(tmp_path):
    kind = type("Own", (DyLoRAMixin, Looks), {})
    one = norms(made(kind, tmp_path, per_device_train_batch_size=8))
    several = norms(made(kind, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3))
    np.testing.assert_allclose(several, one, rtol=2e-3)


def test_a_batch_whose_labels_do_not_count_tells_nothing_of_the_loss(tmp_path):
    ignored = [{"input_ids": list(range(5, 30)), "labels": -100}] * 4 + rows(4)
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, per_device_eval_batch_size=4)
    later = made(DyLoRATrainer, tmp_path, eval_on_start=True, eval_strategy="epoch", eval_dataset=ignored, **options)
    np.testing.assert_allclose(norms(later), norms(made(DyLoRATrainer, tmp_path, **options)), rtol=2e-3)


def test_a_micro_batch_without_a_masked_token_adds_nothing(tmp_path):
    def masked(examples):
        batch = collate(examples)
        labels = torch.where(batch["input_ids"] % 2 == 0, batch["input_ids"], -100)
        labels[[i for i, e in enumerate(examples) if e["labels"]]] = -100
        return batch | {"labels": labels}

    data = [e | {"labels": i % 2} for i, e in enumerate(rows(4))]
    options = dict(data=data, collator=masked, train_sampling_strategy="sequential")
    one = made(
        DyLoRATrainer,
        tmp_path,
        model=bert(tf.BertForMaskedLM),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
    )
    found = norms(one)
    assert all(map(math.isfinite, found[0])) and found[0][1] > 0


WEIGHTS = torch.tensor([1.0, 1.0, 10.0])


def test_weights_that_a_later_batch_shows_count(tmp_path):
    """The first batch lacks the rare class; then the losses of all batches are the trainer's own."""
    data = rows(12, labels=2, low=8) + [{"input_ids": [5, 6, 7 + i], "labels": i % 3} for i in range(8)]

    def weighted(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels, WEIGHTS)

    for schedule in (lora.RankSchedule("fixed"), lora.RankSchedule("example")):
        options = dict(eval_dataset=data, compute_loss_func=weighted, per_device_eval_batch_size=4, schedule=schedule)
        with_metrics = made(DyLoRATrainer, tmp_path, compute_metrics=accuracy, **options)
        found = with_metrics.evaluate()
        stock = dict(eval_dataset=data, compute_loss_func=weighted, per_device_eval_batch_size=4)
        for b in (1, 4):
            with lora.use_rank(with_metrics.model, b):
                peer = made(Trainer, tmp_path, model=with_metrics.model, compute_metrics=accuracy, **stock).evaluate()
            assert found[f"eval_r{b}_accuracy"] == pytest.approx(peer["eval_accuracy"])
            assert found[f"eval_r{b}_loss"] == pytest.approx(peer["eval_loss"], rel=1e-4)


def pairs(examples):
    """As a collator of preferences: the chosen ones, then the rejected ones."""
    batch = collate([*examples, *[e | {"input_ids": e["input_ids"][::-1]} for e in examples]])
    return {name: value for name, value in batch.items() if name != "labels"}


class Preferences(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        chosen, rejected = outputs.logits[:, 0].chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


def test_pairs_count_as_examples(tmp_path):
    kind = type("Own", (DyLoRAMixin, Preferences), {})
    options = dict(collator=pairs, schedule=lora.RankSchedule(sampling="step"), eval_dataset=rows(6))
    one, four = (made(kind, tmp_path, per_device_eval_batch_size=n, **options) for n in (1, 4))
    alone, together = one.evaluate(), four.evaluate()
    for b in (1, 4):
        assert together[f"eval_r{b}_loss"] == pytest.approx(alone[f"eval_r{b}_loss"], rel=1e-4)
    assert len(four.scored.losses) == 6
    (row, *_), found = four.measure_ranks().splits["validation"], np.load(tmp_path / "predictions_validation.npz")
    assert row.samples == len(found["losses"]) == 6


class Tags(torch.nn.Module):
    """A model of one's own: tags of tokens under a name of their own, and a number beside the logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)

    def forward(self, input_ids, tags=None, attention_mask=None):
        logits = self.out(self.embed(input_ids))
        loss = None if tags is None else cross_entropy(logits.flatten(0, 1), tags.flatten())
        return {"loss": loss, "logits": logits, "beside": logits.mean()}


def test_labels_of_another_name_and_outputs_of_one_number(tmp_path):
    def tagged(examples):
        batch = collate(examples)
        del batch["labels"]
        return batch | {"tags": torch.where(batch["input_ids"] > 0, batch["input_ids"] % 3, -100)}

    data, losses, seen = rows(9), [], []
    model = lora.inject(Tags(), ["out"], r=4)
    torch.nn.init.normal_(model.out.lora_B)
    for size in (1, 3, 9):
        t = made(
            DyLoRATrainer, tmp_path, model=model, collator=tagged, label_names=["tags"], remove_unused_columns=False, per_device_eval_batch_size=size,
            eval_dataset=data, compute_metrics=lambda p: seen.append(p.predictions) or {"n": len(p.predictions[0])},
        )  # fmt: skip
        losses.append([t.evaluate()[f"eval_r{b}_loss"] for b in (1, 4)])
        assert np.shape(seen[-1][1]) == (math.ceil(9 / size),)
    np.testing.assert_allclose(losses, losses[:1] * 3, rtol=1e-4)


class NeedsNoLabels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(4, 4)

    def forward(self, x, return_loss: bool = True):
        y = self.out(x)
        return {"loss": (y - x).square().mean(), "y": y}


def test_a_loss_that_needs_no_labels_is_reported(tmp_path):
    data = [{"x": torch.randn(4)} for _ in range(7)]
    model = lora.inject(NeedsNoLabels(), ["out"], r=4)
    torch.nn.init.normal_(model.out.lora_B)

    def stacked(examples):
        return {"x": torch.stack([e["x"] for e in examples])}

    t = made(
        DyLoRATrainer, tmp_path, model=model, data=data, collator=stacked, compute_metrics=lambda p: {"n": 1.0},
        schedule=lora.RankSchedule("example"), label_names=[], eval_dataset=data, per_device_eval_batch_size=7,
    )  # fmt: skip
    found, x = t.evaluate(), torch.stack([e["x"] for e in data])
    for b in (1, 4):
        with lora.use_rank(model, b), torch.no_grad():
            assert found[f"eval_r{b}_loss"] == pytest.approx(float(model(x)["loss"]), rel=1e-4)
    assert "test_r1_loss" in t.predict(data).metrics


def test_metrics_may_be_tensors_and_have_the_prefix(tmp_path):
    def tensors(prediction):
        value = accuracy(prediction)["accuracy"]
        return {"eval_accuracy": torch.tensor(value), "array": np.array(value), "plain": value}

    found = made(DyLoRATrainer, tmp_path, eval_dataset=rows(9), compute_metrics=tensors).evaluate()
    assert found["eval_aurac_accuracy"] == pytest.approx(found["eval_aurac_plain"])
    assert found["eval_mean_array"] == pytest.approx(found["eval_mean_plain"])
    assert not any(re.search("eval.*eval", name) for name in found)


def test_a_loss_of_a_subclass_has_no_perplexity(tmp_path):
    class More(DyLoRATrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            return (loss + 2, outputs) if return_outputs else loss + 2

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    data = [e | {"labels": e["input_ids"]} for e in rows(4, low=6, high=7)]
    found = {}
    for kind in (DyLoRATrainer, More):
        model = lora.inject(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), ["q_proj"], r=2)
        found[kind] = made(kind, tmp_path, model=model, eval_dataset=data).evaluate()
    assert found[DyLoRATrainer]["eval_r1_perplexity"] == pytest.approx(math.exp(found[DyLoRATrainer]["eval_r1_loss"]))
    assert "eval_r1_perplexity" not in found[More]


def test_a_search_over_several_sets_sums_areas_not_losses():
    both = {
        f"eval_{name}_{metric}": value
        for name in "ab"
        for metric, value in (("aurac_f1", 0.2), ("r1_f1", 0.1), ("loss", 9.0), ("r1_loss", 8.0))
    }
    assert _objective(both) == pytest.approx(0.4)
    assert _objective({name: value for name, value in both.items() if "f1" not in name}) == 18.0
    assert _objective({"eval_loss": 3.0, "eval_r1_loss": 2.0, "eval_r2_loss": 4.0}) == 3.0


def test_lengths_are_read_as_they_are_stored():
    """A transform may use the column up; a user's mapping is no dict."""
    data = datasets.Dataset.from_dict({"text": ["a b", "c"], "length": [2, 1]})
    assert lengths_of(data.with_transform(lambda batch: {"input_ids": [[5]] * len(batch["text"])})) == [2, 1]
    assert lengths_of([tf.BatchEncoding({"input_ids": [1] * n}) for n in (3, 1)]) == [3, 1]
    assert lengths_of(
        datasets.Dataset.from_dict({"input_values": [[0.1] * n for n in (3, 9)]}), inputs="input_values"
    ) == [3, 9]


@pytest.mark.parametrize("plain", [False, True])
def test_what_trainer_and_classes_between_save_is_saved(plain, tmp_path, roberta_checkpoint):
    class Between(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            open(f"{output_dir}/mine.txt", "w").close()

    kind = type("Own", (DyLoRAMixin, Between), {})
    model = lora.inject(Tags(), ["out"], r=2) if plain else bert()
    tokenizer = tf.AutoTokenizer.from_pretrained(roberta_checkpoint)
    (tmp_path / "model.safetensors").write_text("of another run")
    t = made(kind, tmp_path, model=model, collator=tf.DataCollatorWithPadding(tokenizer))
    t.save_model()
    there = {file.name for file in tmp_path.iterdir()}
    assert {"mine.txt", "tokenizer_config.json", "training_args.bin", "adapter_model.safetensors"} <= there
    assert (tmp_path / "model.safetensors").read_text() == "of another run"
    assert not any("aside" in name for name in there)
