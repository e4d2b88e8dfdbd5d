"""What a rank gets for itself after the training: a refitted head."""

from contextlib import nullcontext

import pytest
import torch
from sklearn.linear_model import LogisticRegressionCV

import loralib as lora
from scripts.study import cells, private
from scripts.study import methods as study_methods

from .test_study import encoder_with_adapters

RANKS = (1, 2, 3)  # of a small encoder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(private, "SHOWN", RANKS)
    model, _ = encoder_with_adapters()
    inputs = torch.randint(5, 50, (60, 7), generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 1] > 27).long()
    batches = [{"input_ids": inputs[i : i + 20], "labels": labels[i : i + 20]} for i in (0, 20, 40)]
    return model, batches, inputs, labels


@pytest.mark.parametrize("labels", [2, 3])
def test_a_refitted_layer_says_what_the_regression_says(labels):
    torch.manual_seed(0)
    x, y = torch.randn(90, 5), torch.arange(90) % labels
    x[:, 0] += y
    weight, bias = private.refitted(x, y)
    peer = LogisticRegressionCV(
        Cs=private.STRENGTHS, cv=3, max_iter=500, scoring="neg_log_loss", l1_ratios=(0,), use_legacy_attributes=False
    ).fit(x, y)
    found = torch.softmax(x.double() @ weight.T + bias, -1)
    torch.testing.assert_close(found, torch.tensor(peer.predict_proba(x)), rtol=1e-6, atol=1e-8)


def test_each_rank_has_its_own_head_and_the_model_is_whole_again(small):
    model, batches, inputs, labels = small
    before = model(input_ids=inputs).logits
    losses, shared = {}, {}
    for b in RANKS:
        with lora.use_rank(model, b):
            shared[b] = model(input_ids=inputs, labels=labels).loss
    for b in private.with_heads(model, batches, nullcontext):
        with lora.use_rank(model, b):
            losses[b] = model(input_ids=inputs, labels=labels).loss
            features = torch.tanh(model.classifier.dense(model.roberta(inputs)[0][:, 0])).float()
        weight, _ = private.refitted(features.detach(), labels)
        torch.testing.assert_close(model.classifier.out_proj.weight, weight, rtol=1e-3, atol=1e-5)
    assert all(losses[b] < shared[b] for b in RANKS)  # on what it was fitted to
    torch.testing.assert_close(model(input_ids=inputs).logits, before, rtol=0, atol=0)


def test_they_are_measured_with_the_leads_alone():
    tried = {name for name, made in study_methods.CUTS.items() if made.tried}
    assert tried == {"cut-whitened", "cut-heads", "mixed-0.8-heads"}
    assert cells.Cell("mnli", "lora-8", 0, cells.TRIED_RATE, "held_out").is_lead
    assert not cells.Cell("mnli", "lora-8", 0, cells.TRIED_RATE, "validation").is_lead
    assert not cells.Cell("cola", "lora-8", 0, cells.TRIED_RATE, "held_out").is_lead
