"""Models: checkpoints that are not what they say, tokenizers that are not there, heads in another order."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .judge import Case
from .world import LABELS, common, evaluate, train


def changed(change, start=train, model="base"):
    """The command on a base that was changed."""

    def argv(folder: Path):
        change(folder / model)
        return start(folder, folder / "out", model=model)

    return argv


def whole(change=lambda directory: None):
    """Evaluation of the classifier, changed before."""
    return changed(change, lambda folder, out, model: [*common(folder, out, model=model), "--do_eval"], "whole")


def config(**values):
    def change(directory: Path):
        file = directory / "config.json"
        content = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def weights(change):
    def apply(directory: Path):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})

    return apply


def without(*patterns):
    return lambda directory: [file.unlink() for pattern in patterns for file in directory.glob(pattern)]


def cut_off(directory: Path):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def put(name: str, content: bytes):
    return lambda directory: (directory / name).write_bytes(content)


def reorder(tensors):
    for key in tensors:
        if "out_proj" in key:
            tensors[key] = tensors[key].flip(0)


def both(*changes):
    return lambda directory: [change(directory) for change in changes]


def one_query(tensors):
    key = next(key for key in tensors if key.endswith("query.weight"))
    tensors[key] = torch.zeros(3, 3)


def named(names):
    return config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def accuracy_is_one(folder, found):
    results, _ = found
    assert [row.scores["accuracy"] for row in results.splits["validation"]] == [1.0]


def three(tensors):
    for key in tensors:
        if "out_proj" in key:
            tensors[key] = torch.cat([tensors[key], tensors[key][:1]])


def with_a_head_of_three(folder: Path):
    """Evaluation of the adapter on its base, saved with a head for three labels."""
    from transformers import RobertaForSequenceClassification

    RobertaForSequenceClassification.from_pretrained(folder / "base", num_labels=3).save_pretrained(folder / "base")
    return evaluate(folder, folder / "out")


CASES = [
    Case("weights cut off", changed(cut_off), "is no whole checkpoint", quick=True),
    Case("weights that are empty", changed(put("model.safetensors", b"")), "is no whole checkpoint"),
    Case("weights that are text", changed(put("model.safetensors", b"oh no, no weights here")), "is no whole checkpoint"),
    Case("no weights", changed(without("model.safetensors")), "is no whole checkpoint"),
    Case("no configuration", changed(without("config.json")), "config"),
    Case("a configuration that is no JSON", changed(put("config.json", b"{")), "config|whole"),
    Case("a configuration of no model", changed(put("config.json", b"{}")), "is no whole checkpoint"),
    Case("fewer layers than weights", changed(config(num_hidden_layers=1)), "for which its configuration has no layer"),
    Case("more layers than weights", changed(config(num_hidden_layers=3)), r"lacks .*layer\.2"),
    Case("another width than the weights'", changed(config(hidden_size=32)), "in another shape than its configuration says"),
    Case("one weight of another shape", changed(weights(one_query)), "in another shape than its configuration says"),
    Case("weights of another model", changed(weights(lambda t: [t.pop(k) for k in list(t) if "layer." in k])), "lacks"),
    Case("no tokenizer", changed(without("tokenizer*")), "holds no tokenizer; give one with --tokenizer_name", quick=True),
    Case("a tokenizer that is no JSON", changed(put("tokenizer.json", b"{")), "is no whole checkpoint"),
    Case("a tokenizer of its own directory", lambda folder: [
        *changed(without("tokenizer*"), evaluate)(folder), "--tokenizer_name", folder / "whole"]),
    Case("a base without a head to answer", lambda folder: [*common(folder, folder / "out"), "--do_eval"], "has no trained head"),
    Case("a classifier", whole(), right=accuracy_is_one, quick=True),
    Case("a classifier in another order", whole(both(weights(reorder), named(LABELS[::-1]))), right=accuracy_is_one, quick=True),
    Case("a classifier in another order and case", whole(both(weights(reorder), named([n.upper() for n in LABELS[::-1]]))),
         right=accuracy_is_one),
    Case("a classifier without names", whole(named(["LABEL_0", "LABEL_1"])), right=accuracy_is_one),
    Case("a classifier of other names", whole(named(["not_equivalent", "equivalent"])), "knows the labels not_equivalent, equivalent"),
    Case("a classifier of three", whole(both(weights(three), named(["a", "b", "c"]))), "has a head of another size"),
    Case("a classifier as a base for training", lambda folder: [*train(folder, folder / "out", model="whole"),
         "--lora_path", "none"], right=lambda folder, found: None),
    Case("a base whose head is of three", with_a_head_of_three),
    Case("an adapter on another base", lambda folder: [
        weights(lambda t: t.update({k: v + 1 for k, v in t.items() if "query.weight" in k or "value.weight" in k}))(folder / "base"),
        evaluate(folder, folder / "out")][1], "base"),
    Case("a base of another width for the adapter", lambda folder: [
        shutil.rmtree(folder / "base"), _wider(folder), evaluate(folder, folder / "out")][2], "shape|wide"),
]  # fmt: skip


def _wider(folder: Path):
    from transformers import RobertaConfig, RobertaModel

    content = RobertaConfig.from_pretrained(folder / "whole")
    content.hidden_size, content.intermediate_size = 32, 64
    RobertaModel(content, add_pooling_layer=False).save_pretrained(folder / "base")
    for file in (folder / "whole").glob("tokenizer*"):
        shutil.copy(file, folder / "base")
