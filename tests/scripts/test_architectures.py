"""The table of architectures says no where something is wrong, and names the layers."""

import pytest
import torch

import loralib as lora
from loralib.model import lora_layers
from scripts.architectures import __main__ as architectures
from scripts.architectures.models import ARCHITECTURES
from tests.docs.pages import ROOT

NAMED = {architecture.name: architecture for architecture in ARCHITECTURES}
QUESTIONS = list(architectures.CHECKS)


@pytest.mark.parametrize("name", ["BERT", "T5"])
def test_every_check_passes_on_it(name):
    (text,) = architectures.table({name: architectures.examine(NAMED[name])})
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells[:2] == [name, "usual, all linear, embeddings"]
    assert cells[2:] == ["yes" if question != "generate" or name == "T5" else "-" for question in QUESTIONS]


def broken(monkeypatch, name, wrong):
    monkeypatch.setattr(lora, name, wrong)
    found = architectures.examine(NAMED["Llama"])
    return {question for question in QUESTIONS if found["all-linear"][question] != "yes"}, found


def test_each_check_can_say_no(monkeypatch):
    merge, order, load = lora.merge, lora.order_components, lora.load_adapter

    def rank_off_by_one(model, rank):
        return merge(model, rank=rank - 1)

    def no_order(model):
        for _, layer in lora_layers(model):
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.flip(0), layer.lora_B.data.flip(1)
        order(model)
        for _, layer in lora_layers(model):
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.flip(0), layer.lora_B.data.flip(1)

    def half_loaded(model, directory):
        load(model, directory)
        lora_layers(model)[0][1].lora_B.data *= 0.5

    with monkeypatch.context() as patch:
        assert broken(patch, "merge", rank_off_by_one)[0] == {"merge", "generate"}
    with monkeypatch.context() as patch:
        assert broken(patch, "order_components", no_order)[0] == {"order"}
    with monkeypatch.context() as patch:
        failed, found = broken(patch, "load_adapter", half_loaded)
        assert failed == {"reload"} and "reloaded, rank 1: differs by" in found["all-linear"]["reload"]
    with monkeypatch.context() as patch:
        save = lora.save_adapter
        wrong = lambda model, directory, rank=None: save(model, directory, rank=1)  # noqa: E731
        assert broken(patch, "save_adapter", wrong)[0] == {"export to PEFT", "reload"}
    with monkeypatch.context() as patch:
        set_rank = lora.set_rank
        first_for_all = lambda model, rank: set_rank(  # noqa: E731
            model, int(rank[0]) if isinstance(rank, torch.Tensor) else rank
        )
        assert {"a rank per example", "generate"} <= broken(patch, "set_rank", first_for_all)[0]


def test_a_no_stands_below_the_table_with_its_layers():
    answers = dict.fromkeys(QUESTIONS, "yes")
    found = {"usual": answers, "all-linear": answers | {"merge": "the merged model: differs by 0.5."}}
    lines = "\n".join(architectures.table({"BERT": found}))
    assert "| BERT | usual, all linear | yes |" in lines and "yes, but [1]" in lines
    assert "1. all linear: the merged model: differs by 0.5." in lines


def test_layers_that_are_refused_stand_on_the_page(monkeypatch):
    def refuse(model, where, **options):
        raise ValueError("no embeddings today")

    monkeypatch.setattr(lora, "inject", refuse)
    lines = "\n".join(architectures.table({"BERT": architectures.examine(NAMED["BERT"])}))
    assert "1. no embeddings today" in lines and "| BERT | usual, all linear, embeddings | [1] |" in lines


def test_the_page_holds_every_architecture():
    text = (ROOT / "docs" / "reference" / "architectures.md").read_text(encoding="utf-8")
    assert len(ARCHITECTURES) >= 28
    assert not [name for name in NAMED if f"| {name} |" not in text]
