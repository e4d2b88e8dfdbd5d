"""What a GPU computes, beside the same on the processor. Skipped where there is none."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, DataCollatorWithPadding, LlamaForCausalLM, RobertaForSequenceClassification
from transformers import TrainingArguments as Arguments

import loralib as lora
from loralib.peft import DyLoraConfig
from loralib.trainer import DyLoRATrainer

from .helpers import KINDS, dense_forward, make
from .training.test_trainer import accuracy, data

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
DEVICE = str(torch.accelerator.current_accelerator() or "cpu")
RANKS = torch.tensor([1, 0, 3, 2, 3])


def gradients(layer, x, rank):
    """The output at ``rank`` and the factors' gradients, all on the processor."""
    model = nn.Sequential(layer)
    lora.set_rank(model, rank)
    output = model(x)
    output.square().sum().backward()
    return [value.detach().cpu() for value in (output, layer.lora_A.grad, layer.lora_B.grad)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rank", [2, RANKS, torch.tensor([[0.5, 0.0, 0.5]] * 5)], ids=["int", "per example", "weights of ranks"]
)
def test_layers_compute_as_on_the_processor(kind, rank):
    """Ranks and weights come from the processor, as a sampler gives them."""
    layer, x = make(kind, 3)
    there = copy.deepcopy(layer).to(DEVICE)
    torch.testing.assert_close(gradients(there, x.to(DEVICE), rank), gradients(layer, x, rank))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_ordering_there(kind):
    layer, x = make(kind, 3, scaling="alpha/r")
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    model, weight = nn.Sequential(layer), layer.weight.detach().clone()
    for b in (1, 3):
        lora.set_rank(model, b)
        expected = dense_forward(kind, layer, x, b)
        layer.merge()
        torch.testing.assert_close(layer(x), expected)
        layer.unmerge()
        assert torch.equal(layer.weight, weight)
    optimizer = torch.optim.AdamW(model.parameters())
    layer(x).square().sum().backward()
    optimizer.step()
    expected = layer(x)
    lora.order_components(model, optimizer)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    optimizer.step()


def trainer(config, checkpoint, directory, device, **options):
    torch.manual_seed(0)
    model = lora.inject(RobertaForSequenceClassification(config), ["query", "value"], r=4, lora_alpha=8)
    lora.mark_only_lora_as_trainable(model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, **options}
    args = Arguments(
        str(directory), report_to="none", disable_tqdm=True, seed=3, use_cpu=device == "cpu", save_steps=4, **settings
    )
    return DyLoRATrainer(
        model=model, args=args, train_dataset=data(48), eval_dataset=data(13, 1), processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
    )  # fmt: skip


def test_a_training_is_that_of_the_processor(roberta_config, roberta_checkpoint, tmp_path):
    """The same ranks are drawn, components ordered at the same step; losses and every rank's figures agree."""
    found = []
    for device in ("cpu", DEVICE):
        made = trainer(roberta_config, roberta_checkpoint, tmp_path / device.replace(":", ""), device, logging_steps=1)
        made.train()
        losses = torch.tensor([line["loss"] for line in made.state.log_history if "loss" in line])
        scores = {key: value for key, value in made.evaluate().items() if "accuracy" in key or key.endswith("loss")}
        found.append((losses, scores))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    assert found[1][1] == pytest.approx(found[0][1], abs=0.01)


def test_a_resumed_training_ends_as_one_that_ran_through(roberta_config, roberta_checkpoint, tmp_path):
    whole = trainer(roberta_config, roberta_checkpoint, tmp_path / "whole", DEVICE)
    whole.train()
    again = trainer(roberta_config, roberta_checkpoint, tmp_path / "again", DEVICE)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(lora.lora_state_dict(again.model), lora.lora_state_dict(whole.model))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_every_rank_is_that_of_a_model_set_to_it(
    precision, roberta_config, roberta_checkpoint, tmp_path
):
    made = trainer(roberta_config, roberta_checkpoint, tmp_path, DEVICE, **{precision: True})
    made.train()
    together = made.evaluate()
    for b in range(1, 5):
        made.eval_ranks = [b]
        alone = made.evaluate()
        assert alone[f"eval_r{b}_accuracy"] == pytest.approx(together[f"eval_r{b}_accuracy"], abs=1 / 13 + 1e-6)


def test_importance_spread_over_layers_and_a_saved_adapter(roberta_config, tmp_path):
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(roberta_config).to(DEVICE).eval()
    model = lora.inject(copy.deepcopy(base), ["query", "value"], r=4, lora_alpha=8, scaling="alpha/r").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(4, 100, (6, 9))
    examples = [{"input_ids": row[None], "labels": torch.tensor([i % 3])} for i, row in enumerate(ids)]
    lora.order_by_importance(model, examples)
    lora.save_adapter(model, tmp_path)
    loaded = copy.deepcopy(base)
    lora.load_adapter(loaded, tmp_path)
    for b in (1, 2, 4):
        with lora.use_rank(model, b), lora.use_rank(loaded, b), torch.no_grad():
            torch.testing.assert_close(loaded(ids.to(DEVICE)).logits, model(ids.to(DEVICE)).logits)


def test_ranks_per_example_compile_there(llama_checkpoint):
    model = LlamaForCausalLM.from_pretrained(llama_checkpoint).to(DEVICE)
    lora.inject(model, "all-linear", r=4, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 100, (3, 8), device=DEVICE)
    compiled = torch.compile(model)
    for ranks in ([1, 2, 4], [4, 3, 1]):
        lora.set_rank(model, torch.tensor(ranks))
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_inside_peft(llama_checkpoint):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(llama_checkpoint), DyLoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ).to(DEVICE)
    ids = torch.randint(0, 100, (3, 8), device=DEVICE)
    lora.set_rank(model, torch.tensor([1, 2, 4]))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
