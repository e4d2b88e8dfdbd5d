"""The dylora command on results and predictions that are broken, edited, or another run's."""

import json
from pathlib import Path

import numpy as np

from .judge import Case

TABLE, LOGITS = "rank_results.json", "predictions_validation.npz"


def changed(change, *command):
    """A command on a run that was changed."""

    def argv(folder: Path):
        change(folder / "run")
        return [command[0], folder / "run", *command[1:], *(["--to", folder / "out"] if command[0] != "select" else [])]

    return argv


def put(name: str, content: bytes):
    return lambda run: (run / name).write_bytes(content)


def half(name: str):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[: (run / name).stat().st_size // 2])


def edited(change):
    def apply(run: Path):
        content = json.loads((run / TABLE).read_text())
        change(content)
        (run / TABLE).write_text(json.dumps(content))

    return apply


def rows(change):
    return edited(lambda table: change(table["splits"]["validation"]))


def arrays(**values):
    def apply(run: Path):
        found = dict(np.load(run / LOGITS)) | {k: v(dict(np.load(run / LOGITS))) for k, v in values.items()}
        np.savez(run / LOGITS, **{k: v for k, v in found.items() if v is not None})

    return apply


def spoilt(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[0] = np.nan
    return array


def of_objects(run: Path):
    np.savez(run / LOGITS, logits=np.array([{"a": 1}], dtype=object), labels=np.zeros(1), idx=np.zeros(1))


def page_is_whole(folder: Path, shown):
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    data = page.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    assert json.loads(data)[0]["method"]


def card_is_whole(folder: Path, shown):
    import yaml

    text = (folder / "out" / "README.md").read_text()
    head = yaml.safe_load(text.removeprefix("---").split("\n---\n")[0])
    assert "evil" not in head and head["library_name"] == "peft"


JSON = [
    ("empty", b""), ("cut off", b'{"task": "rte", "splits"'), ("a list", b"[1, 2]"), ("a number", b"5"), ("null", b"null"),
    ("binary", bytes(range(256))), ("an empty table", b"{}"), ("of another program", b'{"results": {"acc": 1}}'),
]  # fmt: skip
NPZ = [("empty", b""), ("text", b"logits"), ("an archive of nothing", b"PK\x05\x06" + b"\0" * 18)]
EDITS = [
    ("no splits", lambda t: t.pop("splits")), ("splits that are a list", lambda t: t.update(splits=[])),
    ("a split without rows", lambda t: t["splits"].update(validation=[])), ("no metric", lambda t: t.pop("metric")),
    ("a metric that no row has", lambda t: t.update(metric="f1")), ("a rank that is text", lambda t: t["splits"]["validation"][0].update(rank="one")),
    ("a rank twice", lambda t: t["splits"]["validation"][1].update(rank=1)), ("a score that is text", lambda t: t["splits"]["validation"][0].update(accuracy="good")),
    ("a row that is a number", lambda t: t["splits"]["validation"].append(3)), ("a row without rank", lambda t: t["splits"]["validation"][0].pop("rank")),
    ("a rank of 0", lambda t: t["splits"]["validation"][0].update(rank=-1)),
]  # fmt: skip
CASES = [
    *(Case(f"select, a table that is {name}", changed(put(TABLE, content), "select"), TABLE, program="dylora", quick=name == "cut off") for name, content in JSON),
    *(Case(f"report, a table that is {name}", changed(put(TABLE, content), "report"), TABLE, program="dylora") for name, content in JSON),
    *(Case(f"select, {name}", changed(edited(change), "select"), "rank_results|metric|split", program="dylora") for name, change in EDITS),
    *(Case(f"select, predictions that are {name}", changed(put(LOGITS, content), "select"), LOGITS, program="dylora") for name, content in NPZ),
    Case("select, predictions cut off", changed(half(LOGITS), "select"), LOGITS, program="dylora", quick=True),
    Case("select, predictions with code", changed(of_objects, "select"), LOGITS, program="dylora"),
    Case("select, predictions without labels", changed(arrays(labels=lambda a: None), "select"), LOGITS, program="dylora"),
    Case("select, fewer rows than the table", changed(arrays(logits=lambda a: a["logits"][:5], labels=lambda a: a["labels"][:5]), "select"),
         LOGITS, program="dylora"),
    Case("select, fewer ranks than the table", changed(arrays(logits=lambda a: a["logits"][:, :2]), "select"), LOGITS, program="dylora"),
    Case("select, logits that are nan", changed(arrays(logits=lambda a: spoilt(a["logits"])), "select"), LOGITS, program="dylora"),
    Case("select, another run's predictions", changed(arrays(logits=lambda a: -a["logits"]), "select"), LOGITS, program="dylora"),
    Case("select, as it is", changed(lambda run: None, "select"), program="dylora", right=lambda f, shown: None, quick=True),
    Case("select, a tolerance of no number", changed(lambda run: None, "select", "--within", "two"), "--within is 'two'", program="dylora"),
    Case("select, a tolerance of nan", changed(lambda run: None, "select", "--within", "nan"), "within is nan", program="dylora"),
    Case("select, a negative tolerance", changed(lambda run: None, "select", "--within", "-1"), "within is -1.0", program="dylora"),
    Case("select, no such split", changed(lambda run: None, "select", "--split", "test"), "choose one of validation", program="dylora"),
    Case("select, too few parameters", changed(lambda run: None, "select", "--max-parameters", "5"), "No rank has 5 parameters", program="dylora"),
    Case("select, no directory", lambda folder: ["select", folder / "nowhere"], "holds no rank_results.json", program="dylora"),
    Case("export, rank 0", changed(lambda run: None, "export", "--rank", "0"), "1..3|rank", program="dylora"),
    Case("export, rank 9", changed(lambda run: None, "export", "--rank", "9"), "can be cut to 1..3", program="dylora"),
    Case("export, rank big", changed(lambda run: None, "export", "--rank", "big"), "--rank is 'big'", program="dylora"),
    Case("export, auto without a table", changed(lambda run: (run / TABLE).unlink(), "export", "--rank", "auto"), "rank_results.json", program="dylora"),
    Case("export, onto data", lambda folder: ["export", folder / "run", "--rank", "1", "--to", folder / "rte"], "holds other files", program="dylora", quick=True),
    Case("export, onto itself", lambda folder: ["export", folder / "run", "--rank", "1", "--to", folder / "run"], "holds other files", program="dylora"),
    Case("export, below a file", lambda folder: ["export", folder / "run", "--rank", "1", "--to", folder / "rte" / "train.jsonl" / "x"],
         "train.jsonl/x: Not a directory", program="dylora"),
    Case("export, a base name of several lines", changed(lambda run: edited_config(run, "a\nevil: true\n---\n"), "export", "--rank", "1"),
         program="dylora", right=card_is_whole),
    Case("merge, a base that is not there", changed(lambda run: None, "merge", "--rank", "1", "--base", "/nowhere"), "--base", program="dylora"),
    Case("report, a method that is a script", changed(edited(lambda t: t.update(method="<!--<script>alert('$x$')</script>")), "report"),
         program="dylora", right=page_is_whole),
    Case("report, a task of dollars", changed(edited(lambda t: t.update(task="$\\frac$ $")), "report"), program="dylora", right=lambda f, shown: None),
    Case("inspect, a run's data", lambda folder: ["inspect", folder / "rte"], "holds no adapter_config.json", program="dylora"),
    Case("no command", lambda folder: [], "COMMAND", program="dylora"),
    Case("an unknown command", lambda folder: ["squash", folder / "run"], "squash", program="dylora"),
]  # fmt: skip


def edited_config(run: Path, base: str):
    file = run / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
