"""Whatever bytes a file holds, what reads it gives a whole value or one sentence; hypothesis makes the bytes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers_dylora.data import load_files
from transformers_dylora.errors import UsageError
from transformers_dylora.output_dir import damage_of

import loralib as lora
from loralib.adapters.directory import describe_adapter, read_bin, read_directory
from loralib.report.choice import choose, read_predictions
from loralib.report.results import RankResults, RankRow

many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def spoilt(draw, content: bytes) -> bytes:
    """The content with a part cut out, doubled, or replaced by other bytes."""
    start = draw(st.integers(0, len(content)))
    end = min(len(content), start + draw(st.integers(0, 40)))
    how = draw(st.sampled_from(["cut off", "cut out", "doubled", "replaced"]))
    if how == "cut off":
        return content[:start]
    middle = {"cut out": b"", "doubled": content[start:end] * 2}.get(how)
    return content[:start] + (draw(st.binary(max_size=40)) if middle is None else middle) + content[end:]


@st.composite
def edited(draw, table: dict) -> dict:
    """The table with one of its values, at any depth, replaced by anything or left out."""
    content = json.loads(json.dumps(table))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(ANYTHING)
        else:
            del place[key]
        return content


def sentence(error: Exception) -> None:
    text = str(error)
    assert text.strip() and "\n" not in text.strip(), text


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = lora.inject(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), ["0", "1"], r=2)
    lora.save_adapter(model, tmp_path_factory.mktemp("adapter"), extra={"task": "rte", "labels": ["a", "b"]})
    torch.save(lora.lora_state_dict(model), tmp_path_factory.getbasetemp() / "state.bin")
    return max(tmp_path_factory.getbasetemp().glob("adapter*"))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "dylora.json"])
@many
@given(data=st.data())
def test_an_adapters_bytes(name, data, adapter, tmp_path):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(adapter, copy)
    (copy / name).write_bytes(data.draw(spoilt((adapter / name).read_bytes())))
    read_or_refuse(copy)


@pytest.mark.parametrize("name", ["adapter_config.json", "dylora.json"])
@many
@given(data=st.data())
def test_an_adapters_tables(name, data, adapter, tmp_path):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(adapter, copy)
    (copy / name).write_text(json.dumps(data.draw(edited(json.loads((adapter / name).read_text())))))
    read_or_refuse(copy)


def read_or_refuse(directory: Path) -> None:
    """All that reads an adapter: its description, the loading into a model, the export."""
    for reader in (
        read_directory,
        describe_adapter,
        lambda path: lora.load_adapter(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), path),
    ):
        try:
            found = reader(directory)
        except (ValueError, FileNotFoundError) as error:
            sentence(error)
        else:
            assert found is not None


@many
@given(data=st.data())
def test_a_state_dicts_bytes(data, adapter, tmp_path):
    (tmp_path / "state.bin").write_bytes(data.draw(spoilt((adapter.parent / "state.bin").read_bytes())))
    try:
        assert all(isinstance(value, torch.Tensor) for value in read_bin(tmp_path / "state.bin").values())
    except ValueError as error:
        sentence(error)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(12, 2, 2)).astype("float32"), generator.integers(0, 2, 12)
    rows = [
        RankRow(b, {"accuracy": float((logits[:, k].argmax(-1) == labels).mean())}, 0.5, 12, 100 * b)
        for k, b in enumerate((1, 2))
    ]
    value = RankResults(
        task="rte",
        model_name_or_path="m",
        method="DyLoRA",
        seed=0,
        metric="accuracy",
        max_rank=2,
        splits={"validation": rows},
    )
    (directory / "rank_results.json").write_text(json.dumps(value.to_json()))
    np.savez(directory / "predictions_validation.npz", logits=logits, labels=labels, idx=np.arange(12))
    return directory


@settings(many, max_examples=25)  # a choice draws the examples anew 200 times
@given(data=st.data())
def test_a_tables_values(data, results, tmp_path):
    content = data.draw(edited(json.loads((results / "rank_results.json").read_text())))
    (tmp_path / "rank_results.json").write_text(json.dumps(content))
    shutil.copy(results / "predictions_validation.npz", tmp_path)
    try:
        choose(RankResults.read(tmp_path))
    except (ValueError, FileNotFoundError) as error:
        sentence(error)


@many
@given(data=st.data())
def test_a_tables_bytes(data, results, tmp_path):
    (tmp_path / "rank_results.json").write_bytes(data.draw(spoilt((results / "rank_results.json").read_bytes())))
    try:
        assert RankResults.read(tmp_path).splits
    except (ValueError, FileNotFoundError) as error:
        sentence(error)


@many
@given(data=st.data())
def test_predictions_bytes(data, results, tmp_path):
    file = tmp_path / "predictions_validation.npz"
    file.write_bytes(data.draw(spoilt((results / file.name).read_bytes())))
    try:
        logits, labels = read_predictions(file, RankResults.read(results), "validation")
    except ValueError as error:
        sentence(error)
    else:
        assert logits.shape == (12, 2, 2) and labels.shape == (12,)


CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.sampled_from(["a", "b", "", "NA"]),
    st.lists(st.integers(), max_size=2),
)


def equal(one, other) -> bool:
    """As labels: 1 and 1.0 are, and True and 1 are two names, whatever Python says."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@settings(many, max_examples=40)
@example(rows=[{"text": "", "label": True}, {"text": "", "label": 1}])
@given(rows=st.lists(st.fixed_dictionaries({"text": st.one_of(st.text(max_size=5), CELL), "label": CELL}), max_size=4))
def test_rows_of_ones_own_file(rows, tmp_path):
    """Labels come as they were, in number and name, or are refused."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        task, splits = load_files({"train": str(file)}, str(tmp_path / "cache"))
    except UsageError as error:
        sentence(error)
        return
    labels = splits["train"]["label"][:]
    assert len(labels) == len(rows) and all(isinstance(row["text"], str) for row in rows)
    if task.regression:
        assert labels == pytest.approx([row["label"] for row in rows]) and np.isfinite(labels).all()
    else:
        assert all(row["label"] is not None for row in rows) and set(labels) <= set(range(len(task.labels)))
        names = [task.labels[label] for label in labels]
        assert all(
            (names[i] == names[k])
            == (str(rows[i]["label"]) == str(rows[k]["label"]) or equal(rows[i]["label"], rows[k]["label"]))
            for i in range(len(rows))
            for k in range(i)
        )


@settings(many, max_examples=40)
@given(data=st.data())
def test_bytes_of_a_csv(data, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(data.draw(spoilt(b'text,label\n"a, b",x\nc,y\nd,x\n')))
    try:
        task, splits = load_files({"train": str(file)}, str(tmp_path / "cache"))
    except UsageError as error:
        sentence(error)
    else:
        assert len(task.labels) > 1 and len(splits["train"])


@pytest.fixture(scope="module")
def checkpoint(adapter, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "checkpoint-2"
    shutil.copytree(adapter, directory)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        torch.save({"a": torch.arange(50), "b": list(range(20))}, directory / name)
    (directory / "trainer_state.json").write_text('{"global_step": 2, "log_history": []}')
    return directory


@many
@given(data=st.data())
def test_a_checkpoint_that_is_called_whole_can_be_read(data, checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    name = data.draw(st.sampled_from(sorted(file.name for file in checkpoint.iterdir())))
    (copy / name).write_bytes(data.draw(spoilt((checkpoint / name).read_bytes())))
    if damage_of(copy) is None and name.endswith((".pt", ".pth", ".bin")):
        assert torch.load(copy / name, weights_only=False)["b"] == list(range(20))
