"""Every rank scored for every task: what a rank is given is what stock Trainer gives for the merged model."""

import numpy as np
import pytest
import torch
import transformers as tf
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import loralib as lora
from loralib.model import lora_layers
from loralib.trainer import DyLoRAMixin, DyLoRATrainer

TINY = dict(
    hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=50, pad_token_id=0
)
POSITIONS = dict(max_position_embeddings=64)
T5 = dict(
    vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
)
LENGTHS = (9, 3, 6, 12, 4, 5, 8, 2)


class Seq2Seq(DyLoRAMixin, Seq2SeqTrainer):
    pass


def ids(n: int) -> list[int]:
    return torch.randint(5, 50, (n,)).tolist()


def tokens(n):
    return {"input_ids": ids(n), "labels": torch.randint(0, 3, (n,)).tolist()}


def causal(n):
    text = ids(n + 1)
    return {"input_ids": text, "labels": [-100, *text[1:]]}


def span(n):
    return {"input_ids": ids(n), "start_positions": 0, "end_positions": n - 1}


def several(n):
    return {"input_ids": ids(n), "labels": torch.randint(0, 2, (3,)).float().tolist()}


def translation(n):
    return {"input_ids": ids(n), "labels": ids(n // 2 + 1)}


def collate(rows):
    """Pad inputs with 0 and labels of tokens with -100."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if not isinstance(values[0], list) or isinstance(values[0][0], float):
            batch[name] = torch.tensor(values)
            continue
        longest = max(map(len, values))
        fill = -100 if name == "labels" else 0
        batch[name] = torch.tensor([value + [fill] * (longest - len(value)) for value in values])
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch


def checksum(prediction) -> dict[str, float]:
    """A number that any change of a prediction, of its order or of its labels would change; padding counts for nothing."""
    arrays = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    labels = prediction.label_ids if isinstance(prediction.label_ids, tuple) else (prediction.label_ids,)
    total = 0.0
    for k, array in enumerate((*arrays, *labels)):
        for i, row in enumerate(np.asarray(array, float)):
            kept = row[row != -100]
            total += (i + 1) * (k + 1) * float((kept * np.cos(np.arange(kept.size).reshape(kept.shape))).sum())
    return {"checksum": total}


TASKS = {
    "token classification": (
        lambda: tf.BertForTokenClassification(tf.BertConfig(**TINY, num_labels=3)), tokens, ["query", "value"], DyLoRATrainer,
    ),
    "causal": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, num_key_value_heads=2)), causal, ["q_proj", "v_proj"], DyLoRATrainer,
    ),
    "question answering": (
        lambda: tf.BertForQuestionAnswering(tf.BertConfig(**TINY)), span, ["query", "value"], DyLoRATrainer,
    ),
    "multi-label": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**TINY, num_labels=3, problem_type="multi_label_classification")),
        several, ["query", "value"], DyLoRATrainer,
    ),
    "sequence to sequence": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), translation, ["q", "v"], Seq2Seq,
    ),
    "generation": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), translation, ["q", "v"], Seq2Seq,
    ),
}  # fmt: skip


def prepared(name, tmp_path, **more):
    build, row, targets, kind = TASKS[name]
    torch.manual_seed(0)
    model = lora.inject(build(), targets, r=4)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_A)
        torch.nn.init.normal_(layer.lora_B)
    lora.mark_only_lora_as_trainable(model)
    options = dict(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=3,
        per_device_train_batch_size=2, label_names=["start_positions", "end_positions"] if "answering" in name else None,
    )  # fmt: skip
    if kind is Seq2Seq:
        options |= dict(predict_with_generate=name == "generation", generation_max_length=8)
    arguments = (Seq2SeqTrainingArguments if kind is Seq2Seq else TrainingArguments)(**options | more)
    data = [row(n) for n in LENGTHS]
    return kind, dict(model=model, args=arguments, eval_dataset=data, train_dataset=data, data_collator=collate)


# Generated tokens are no logits to preprocess.
@pytest.mark.parametrize(
    ("name", "reduced"),
    [(name, reduced) for name in TASKS for reduced in (False, True) if not (reduced and name == "generation")],
)
def test_metrics_at_a_rank_are_the_merged_models_under_stock_trainer(name, reduced, tmp_path):
    kind, options = prepared(name, tmp_path, per_device_eval_batch_size=1)  # else the two pad differently
    if reduced:
        options["preprocess_logits_for_metrics"] = lambda logits, labels: (
            tuple(x.argmax(-1) for x in logits) if isinstance(logits, tuple) and "answering" in name
            else (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
        )  # fmt: skip
    found = kind(**options, compute_metrics=checksum, eval_ranks=[1, 3, 4]).evaluate()
    peer = Seq2SeqTrainer if kind is Seq2Seq else Trainer
    losses = []
    for rank in (1, 3, 4):
        merged = lora.merge(options["model"], rank)
        expected = peer(**options | {"model": merged}, compute_metrics=checksum).evaluate()
        assert found[f"eval_r{rank}_checksum"] == pytest.approx(expected["eval_checksum"], rel=1e-4, abs=1e-3)
        losses.append(found[f"eval_r{rank}_loss"])
    assert found["eval_loss"] == pytest.approx(np.mean(losses))


# BERT's question answering takes its softmax over padding too: there a loss depends on what it is padded to.
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("generation", "question answering")])
def test_a_loss_does_not_depend_on_the_batches(name, tmp_path):
    found = []
    for size in (1, 3, 8):
        kind, options = prepared(name, tmp_path, per_device_eval_batch_size=size)
        found.append(kind(**options, eval_ranks=[1, 4]).evaluate())
    for metrics in found[1:]:
        assert metrics["eval_r1_loss"] == pytest.approx(found[0]["eval_r1_loss"], rel=1e-5)
        assert metrics["eval_r4_loss"] == pytest.approx(found[0]["eval_r4_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi-label", "question answering"])
def test_the_best_model_is_found_by_its_loss(name, tmp_path):
    more = dict(
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=4,
        load_best_model_at_end=True,
    )
    kind, options = prepared(name, tmp_path, **more)
    trainer = kind(**options)
    trainer.train()
    assert trainer.state.best_metric == min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)


class Preference(DyLoRAMixin, Trainer):
    """As DPO: a loss of pairs, which no label says."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(input_ids=inputs["input_ids"])
        loss = -torch.nn.functional.logsigmoid(output.logits.mean((1, 2))).mean()
        return (loss, output) if return_outputs else loss


@pytest.mark.parametrize("losses", ["its own", "smoothed", "a function's", "of pairs"])
def test_only_a_language_models_own_loss_has_a_perplexity(losses, tmp_path):
    kind, options = prepared("causal", tmp_path, label_smoothing_factor=0.2 if losses == "smoothed" else 0.0)
    if losses == "a function's":
        options["compute_loss_func"] = lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()
    if losses == "of pairs":
        kind = Preference
        options["eval_dataset"] = [{"input_ids": row["input_ids"]} for row in options["eval_dataset"]]
    found = kind(**options, eval_ranks=[1, 4]).evaluate()
    if losses == "its own":
        assert found["eval_r4_perplexity"] == pytest.approx(np.exp(found["eval_r4_loss"]))
    else:
        assert not any("perplexity" in name for name in found)
    if losses != "of pairs":
        assert np.isfinite(found["eval_r4_loss"])


def test_inputs_and_losses_reach_the_metrics(tmp_path):
    seen = []
    kind, options = prepared("token classification", tmp_path, include_for_metrics=["inputs", "loss"])
    kind(**options, compute_metrics=lambda p: seen.append(p) or {}, eval_ranks=[1, 2]).evaluate()
    first, lengths = seen[0], [len(row["input_ids"]) for row in options["eval_dataset"]]
    assert len(seen) == 2 and first.losses.shape == (8,) and ((first.inputs > 0).sum(1) == lengths).all()


def test_logits_that_would_not_fit_are_refused_at_the_first_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("loralib.training.evaluation.LOGITS_BUDGET", 1000)
    kind, options = prepared("causal", tmp_path)
    with pytest.raises(
        ValueError, match=r"8 examples at 4 ranks would take .* GiB; give preprocess_logits_for_metrics"
    ):
        kind(**options, compute_metrics=checksum).evaluate()
    assert "eval_r1_loss" in kind(**options).evaluate()  # losses alone need no logits


@pytest.mark.slow
def test_a_sequence_to_sequence_training_goes_on_as_itself(tmp_path):
    adapters = []
    for out, resume in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-2"))):
        more = dict(
            max_steps=4, save_steps=2, save_strategy="steps", learning_rate=0.01, eval_strategy="steps", eval_steps=2
        )
        kind, options = prepared("generation", tmp_path / out, **more)
        trainer = kind(**options)
        trainer.train(resume_from_checkpoint=resume)
        assert lora.get_rank(trainer.model) == 4
        adapters.append(lora.lora_state_dict(trainer.model))
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
