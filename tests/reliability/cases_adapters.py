"""Adapters: files that are broken, that belong elsewhere, or that are no plain LoRA."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .judge import Case, run
from .world import LABELS, evaluate, train

FILES = ("adapter_config.json", "adapter_model.safetensors", "dylora.json")


def changed(change, start=evaluate):
    """Evaluation of an adapter that was changed."""

    def argv(folder: Path):
        change(folder / "adapter")
        return start(folder, folder / "out", folder / "adapter")

    return argv


def exported(change):
    """``dylora export`` of an adapter that was changed."""

    def argv(folder: Path):
        change(folder / "adapter")
        return ["export", folder / "adapter", "--rank", "2", "--to", folder / "out"]

    return argv


def put(name: str, content: bytes):
    return lambda directory: (directory / name).write_bytes(content)


def gone(name: str):
    return lambda directory: (directory / name).unlink()


def half(name: str):
    return lambda directory: (directory / name).write_bytes(
        (directory / name).read_bytes()[: -len((directory / name).read_bytes()) // 2]
    )


def table(name: str, **values):
    def change(directory: Path):
        file = directory / name
        content = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def weights(change):
    def apply(directory: Path):
        tensors = load_file(directory / FILES[1])
        change(tensors)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, directory / FILES[1], metadata={"format": "pt"}
        )

    return apply


def first(part: str, change):
    def apply(tensors):
        key = next(key for key in tensors if part in key)
        new = change(tensors.pop(key))
        if new is not None:
            tensors[key] = new

    return weights(apply)


def spoilt(value: float):
    def change(tensor):
        tensor.view(-1)[1] = value
        return tensor

    return change


def flip(tensors):
    for key in tensors:
        if "out_proj" in key:
            tensors[key] = tensors[key].flip(0)


def both(*changes):
    return lambda directory: [change(directory) for change in changes]


def code_in_a_bin(folder: Path):
    class Bad:
        def __reduce__(self):
            return (Path(folder / "ran").touch, ())

    (folder / "adapter.bin").write_bytes(pickle.dumps(Bad()))
    return evaluate(folder, folder / "out", folder / "adapter.bin")


def the_same_at_every_rank(folder: Path, found):
    """What is exported at rank 2 scores as rank 2 did."""
    line = evaluate(folder, folder / "out" / "again", folder / "out")
    line[line.index("--lora_r") + 1] = "2"
    line[line.index("--lora_alpha") + 1] = str(
        json.loads((folder / "out" / "adapter_config.json").read_text())["lora_alpha"]
    )
    sentence, measured = run("run_glue", line)
    assert sentence is None, sentence
    before = run("run_glue", evaluate(folder, folder / "out" / "before"))[1][0].splits["validation"]
    assert [r.scores for r in measured[0].splits["validation"]] == [r.scores for r in before[:2]]


def starts(folder: Path, found):
    assert "no more than a start" in found[1]


METHODS = [
    ("DoRA", {"use_dora": True}), ("PiSSA", {"init_lora_weights": "pissa"}), ("OLoRA", {"init_lora_weights": "olora"}),
    ("CorDA", {"init_lora_weights": "corda"}), ("aLoRA", {"alora_invocation_tokens": [1]}), ("a bias", {"bias": "all"}),
    ("LoRA-FA and QA", {"use_qalora": True}), ("trained tokens", {"trainable_token_indices": [1]}),
    ("layers that are repeated", {"layer_replication": [[0, 1]]}),
]  # fmt: skip
CASES = [
    *(Case(f"{name} is missing", changed(gone(name)), "adapter|incomplete", quick=name == FILES[0]) for name in FILES[:2]),
    *(Case(f"{name} is empty", changed(put(name, b"")), "no JSON|damaged") for name in FILES),
    *(Case(f"{name} is cut off", changed(half(name)), "no JSON|damaged", quick=name == FILES[1]) for name in FILES),
    *(Case(f"{name} holds a list", changed(put(name, b"[1]")), "where a table belongs|damaged") for name in FILES),
    *(Case(f"{name} is binary", changed(put(name, bytes(range(256)))), "no JSON|damaged") for name in FILES),
    Case("without dylora.json it is a PEFT adapter", changed(gone(FILES[2])), right=lambda folder, found: None),
    Case("a factor that is nan", changed(first("lora_A", spoilt(float("nan")))), "not finite", quick=True),
    Case("a factor that is inf", changed(first("lora_B", spoilt(float("inf")))), "not finite"),
    Case("a head that is nan", changed(first("out_proj.weight", spoilt(float("nan")))), "not finite"),
    Case("a factor without its other half", changed(first("lora_B", lambda t: None)), "without"),
    Case("a layer that the model has not", changed(weights(lambda t: t.update(
        {k.replace("layer.0", "layer.7"): v.clone() for k, v in t.items() if "layer.0" in k}))), "layer"),
    Case("factors of another width", changed(first("lora_A", lambda t: t[:, :4])), "shape"),
    Case("a head of another size", changed(weights(lambda t: t.update(
        {k: torch.cat([v, v[:1]]) for k, v in t.items() if "out_proj" in k}))), "shape|labels"),
    Case("no head", changed(weights(lambda t: [t.pop(k) for k in list(t) if "classifier" in k])), "does not hold it|classifier"),
    Case("whole numbers", changed(first("lora_A", lambda t: t.int())), "torch.int32; an adapter's numbers are floats"),
    Case("another kind of adapter", changed(table(FILES[0], peft_type="IA3")), "'IA3' adapter; loralib reads peft_type 'LORA'"),
    Case("a rank that is text", changed(table(FILES[0], r="8")), "r = '8'|rank"),
    Case("an alpha of 0", changed(both(table(FILES[0], lora_alpha=0), weights(lambda t: None))), "lora_alpha = 0"),
    Case("an alpha that is nan", changed(both(table(FILES[0], lora_alpha=float("nan")), weights(lambda t: None))), "lora_alpha = nan"),
    *(Case(f"not plain: {name}", changed(table(FILES[0], **values)), next(iter(values))) for name, values in METHODS),
    Case("labels of another task", changed(table(FILES[2], labels=["not_equivalent", "equivalent"])), "knows the labels|labels"),
    Case("labels in another order", changed(both(weights(flip), table(FILES[2], labels=LABELS[::-1]))), quick=True),
    Case("labels of another task are a start in training", changed(
        table(FILES[2], labels=["not_equivalent", "equivalent"]),
        lambda folder, out, adapter: [*train(folder, out), "--lora_path", adapter]), right=starts),
    Case("labels without names", changed(table(FILES[2], labels=["LABEL_0", "LABEL_1"]))),
    Case("as it is", lambda folder: evaluate(folder, folder / "out"), quick=True),
    Case("in half precision", changed(weights(lambda t: t.update({k: v.half() for k, v in t.items()})))),
    Case("a .bin that holds code", code_in_a_bin, "holds code, and was not loaded"),
    Case("a .bin that is text", lambda folder: [put("a.bin", b"text")(folder), evaluate(folder, folder / "out", folder / "a.bin")][1],
         "no plain state dict"),
    Case("a directory that is none of an adapter", lambda folder: evaluate(folder, folder / "out", folder / "rte"), "holds no adapter_config.json"),
    # --- cut
    Case("exported", exported(lambda d: None), program="dylora", right=the_same_at_every_rank, quick=True),
    Case("exported with a factor of another precision", exported(first("lora_A", lambda t: t.bfloat16().float().to(torch.bfloat16))),
         program="dylora", right=lambda folder, found: None),
    Case("exported with half a pair", exported(first("lora_A", lambda t: None)), "without", program="dylora"),
    Case("exported with nan", exported(first("lora_A", spoilt(float("nan")))), "not finite", program="dylora"),
    Case("exported with a cut file", exported(half(FILES[1])), "damaged", program="dylora"),
    Case("exported and no plain LoRA", exported(table(FILES[0], use_dora=True)), "use_dora", program="dylora"),
    Case("inspected with an empty file", lambda folder: [put(FILES[1], b"")(folder / "adapter"), ["inspect", folder / "adapter"]][1],
         "damaged", program="dylora"),
]  # fmt: skip
