"""Frozen weights in autocast's precision: the same to the bit, and the originals come back."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, RobertaForSequenceClassification

import loralib as lora
from loralib.training.precision import frozen_weights_in


def models(roberta_config):
    torch.manual_seed(0)
    yield lora.inject(RobertaForSequenceClassification(roberta_config), ["query", "value"], r=4, lora_alpha=8)
    config = GPT2Config(vocab_size=120, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, num_labels=3,
                        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    yield lora.inject(GPT2ForSequenceClassification(config), ["c_attn", "c_fc"], r=4, lora_alpha=8)


def step(model, rank):
    """Loss and gradients of one step under autocast."""
    torch.manual_seed(1)
    inputs, labels = torch.randint(3, 100, (3, 6)), torch.tensor([0, 1, 2])
    lora.set_rank(model, rank)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=inputs, labels=labels).loss
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("which", range(2))
@pytest.mark.parametrize("rank", [3, torch.tensor([1, 4, 2])])
def test_loss_and_gradients_are_the_same_to_the_bit(which, rank, roberta_config):
    model = list(models(roberta_config))[which].train()
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = dict(model.named_parameters())
    wanted = step(model, rank)
    with frozen_weights_in(model, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(step(model, rank), wanted, strict=True))  # what is called is noted
        found = step(model, rank)
        inside = {name: p.dtype for name, p in model.named_parameters()}
    assert len(found) == len(wanted) > 5
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert any(dtype == torch.bfloat16 for dtype in inside.values())
    assert all(dtype == torch.float32 for name, dtype in inside.items() if before[name].requires_grad)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


class OutputInFull(nn.Module):
    """A model whose output layer computes in fp32 under autocast, called or by its weight alone."""

    def __init__(self, reads):
        super().__init__()
        self.body, self.out, self.reads = nn.Linear(8, 8), nn.Linear(8, 3, bias=False), reads

    def forward(self, x):
        x = self.body(x)
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x.float(), self.out.weight.float()) if self.reads else self.out(x.float())


@pytest.mark.parametrize("reads", [False, True])
def test_what_computes_in_full_stays_so(reads):
    torch.manual_seed(0)
    model = lora.inject(OutputInFull(reads), ["body"], r=2)
    lora.mark_only_lora_as_trainable(model)
    model.requires_grad_(False)
    x = torch.randn(4, 8)

    def out():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    wanted = out()
    with frozen_weights_in(model, torch.bfloat16):
        assert all(torch.equal(out(), wanted) for _ in range(3))
        assert (model.body.weight.dtype, model.out.weight.dtype) == (torch.bfloat16, torch.float32)


def test_the_originals_come_back_after_an_error(roberta_config):
    model = next(models(roberta_config))
    lora.mark_only_lora_as_trainable(model)
    before = dict(model.named_parameters())
    with pytest.raises(KeyError), frozen_weights_in(model, torch.bfloat16):
        raise KeyError
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_pass_within_the_first_one_is_a_pass(roberta_config):
    """As where the examples stand is learnt before the first pass."""
    model = next(models(roberta_config))
    lora.mark_only_lora_as_trainable(model)
    before = dict(model.named_parameters())
    ids = torch.randint(3, 100, (3, 6))
    entered = []

    def within(*_):
        if len(entered) < 2:
            entered.append(True)
            model(ids)

    model.register_forward_pre_hook(within)
    with torch.autocast("cpu", torch.bfloat16), frozen_weights_in(model, torch.bfloat16):
        for _ in range(3):
            model(ids)
    assert all(p is before[name] for name, p in model.named_parameters())
