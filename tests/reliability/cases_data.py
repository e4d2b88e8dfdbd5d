"""Data: files that are broken, rows that lack something, labels written in any way. What is right scores as the plain data."""

import json
from pathlib import Path

import datasets

from .judge import Case
from .world import ADAPTER, LABELS, common, evaluate, read_rows, train, write_rows


def changed(change, split="validation", start=evaluate):
    """The command on data of which one split's rows were changed: ``change`` gives the new rows, or works on one row."""

    def argv(folder: Path):
        file = folder / "rte" / f"{split}.jsonl"
        rows = read_rows(file)
        new = change(rows)
        write_rows(file, rows if new is None else new)
        return start(folder, folder / "out")

    return argv


def row(number: int, **values):
    return lambda rows: rows[number].update(values)


def every(change):
    return lambda rows: [change(dict(r)) for r in rows]


def raw(content: bytes, name: str = "validation.jsonl"):
    def argv(folder: Path):
        (folder / "rte" / "validation.jsonl").unlink()
        (folder / "rte" / name).write_bytes(content)
        return evaluate(folder, folder / "out")

    return argv


def stored(kind: str, names: tuple = LABELS):
    """The validation split as Parquet or as save_to_disk writes it, its class numbers in the order of ``names``."""

    def argv(folder: Path):
        file = folder / "rte" / "validation.jsonl"
        rows = read_rows(file)
        file.unlink()
        features = datasets.Features(
            {
                "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
                "label": datasets.ClassLabel(names=list(names)), "idx": datasets.Value("int64"),
            }
        )  # fmt: skip
        names_of = [name.lower() for name in names]
        data = datasets.Dataset.from_list(
            [r | {"label": names_of.index(LABELS[r["label"]])} for r in rows], features=features
        )
        if kind == "parquet":
            data.to_parquet(folder / "rte" / "validation.parquet")
        else:
            data.save_to_disk(folder / "rte" / "validation")
        return evaluate(folder, folder / "out")

    return argv


def csv_of(rows) -> bytes:
    quoted = lambda text: '"' + str(text).replace('"', '""') + '"'  # noqa: E731
    lines = [",".join(quoted(r[c]) for c in ("sentence1", "sentence2", "label")) for r in rows]
    return "\n".join(["sentence1,sentence2,label", *lines, ""]).encode()


def as_csv(folder: Path):
    rows = read_rows(folder / "rte" / "validation.jsonl")
    return raw(csv_of(rows), "validation.csv")(folder)


def own(content: str, name: str = "own.jsonl", kind: str = "train", start=None):
    """The command on one's own file."""

    def argv(folder: Path):
        (folder / name).write_text(content)
        line = [a for a in (start or train)(folder, folder / "out") if a != "--do_eval" or kind != "train"]
        place = line.index("--task_name")
        line[place : place + 4] = [f"--{kind}_file", str(folder / name)]
        return line

    return argv


def own_rows(rows: list[dict], kind: str = "train", start=None):
    return own("".join(json.dumps(r) + "\n" for r in rows), kind=kind, start=start)


def own_named(change):
    """Evaluation of the adapter on one's own validation file with names for labels."""

    def argv(folder: Path):
        rows = [
            change({"sentence1": r["sentence1"], "sentence2": r["sentence2"], "label": LABELS[r["label"]]})
            for r in read_rows(folder / "rte" / "validation.jsonl")
        ]
        return own_rows(rows, "validation", evaluate)(folder)

    return argv


def predict(folder: Path):
    return [*common(folder, folder / "out"), *ADAPTER, "--do_predict", "--lora_path", str(folder / "adapter")]


def predictions_are_the_labels(folder: Path, found):
    wanted = [
        LABELS[r["label"]] for r in read_rows(folder / "rte" / "validation.jsonl")
    ]  # the test split's rows, labelled
    lines = (folder / "out" / "test_results_rte_r3.txt").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(wanted))]


def predict_on(change):
    return lambda folder: [changed(change, "test")(folder), predict(folder)][1]


TEXTS = {"sentence1": "w1 w2", "sentence2": "w3"}
CASES = [
    # --- rows that lack something
    Case("no text column", changed(every(lambda r: {k: v for k, v in r.items() if k != "sentence2"})), "no column 'sentence2'", quick=True),
    Case("no label column", changed(every(lambda r: {k: v for k, v in r.items() if k != "label"})), "no column 'label'"),
    Case("a text that is null", changed(row(3, sentence1=None)), "None for sentence1 in example 3"),
    Case("a text that is a number", changed(every(lambda r: r | {"sentence1": 5})), "5 for sentence1 in example 0"),
    Case("a text that is a list", changed(every(lambda r: r | {"sentence1": ["w1"]})), r"\['w1'\] for sentence1 in example 0"),
    Case("a label that is null", changed(row(2, label=None)), "no label in example 2", quick=True),
    Case("a label that is null in training", changed(row(2, label=None), "train", train), "no label in example 2"),
    Case("a label of no class", changed(row(5, label=2)), r"label 2 in example 5; rte knows 0 \(entailment\)"),
    Case("a hidden label in validation", changed(row(0, label=-1)), "label -1 in example 0"),
    Case("a label between classes", changed(row(1, label=0.5)), "label 0.5 in example 1"),
    Case("a label of no name", changed(every(lambda r: r | {"label": "maybe"})), "label 'maybe' in example 0"),
    Case("labels that are lists", changed(every(lambda r: r | {"label": [r["label"]]})), r"label \[\d\] in example 0"),
    Case("labels that are tables", changed(every(lambda r: r | {"label": {"k": 1}})), r"label \{'k': 1\} in example 0"),
    Case("a label that is nan", raw(b'{"sentence1": "w1", "sentence2": "w2", "label": NaN}\n'), r"example 0|cannot be read"),
    Case("a label that is inf", raw(b'{"sentence1": "w1", "sentence2": "w2", "label": Infinity}\n'), r"example 0|cannot be read"),
    # --- files that are broken
    Case("an empty file", raw(b""), "validation.jsonl is empty; it needs at least one example", quick=True),
    Case("a file of an empty line", raw(b"\n"), "is empty|cannot be read"),
    Case("half a line", raw(b'{"sentence1": '), "validation.jsonl cannot be read as jsonl"),
    Case("a line that is no table", raw(b"5\n"), "cannot be read|no column"),
    Case("bytes that are no text", raw(bytes(range(128, 256)) * 4), "cannot be read"),
    Case("a CSV of a header alone", raw(b"sentence1,sentence2,label\n", "validation.csv"), "is empty"),
    Case("a CSV with more cells than columns", raw(b"sentence1,sentence2,label\nw1,w2,0,9,9\n", "validation.csv"), "line 2: 3 columns, but cells: 5"),
    Case("a Parquet file that is none", raw(b"PAR1 no", "validation.parquet"), "validation.parquet cannot be read as parquet"),
    Case("no files", lambda folder: evaluate(folder, folder / "out", data=folder / "base"), "holds none of train, validation"),
    Case("a directory that is a file", lambda folder: evaluate(folder, folder / "out", data=folder / "rte" / "train.jsonl"), "is no directory"),
    Case("no validation split", lambda folder: [(folder / "rte" / "validation.jsonl").unlink(), evaluate(folder, folder / "out")][1],
         "--do_eval needs the split 'validation'"),
    Case("no training split", lambda folder: [(folder / "rte" / "train.jsonl").unlink(), train(folder, folder / "out")][1],
         "--do_train needs the split 'train'"),
    # --- the same data, written in another way
    Case("as it is", lambda folder: evaluate(folder, folder / "out"), quick=True),
    Case("labels 0.0 and 1.0", changed(every(lambda r: r | {"label": float(r["label"])}))),
    Case("labels false and true", changed(every(lambda r: r | {"label": bool(r["label"])}))),
    Case("labels '0' and '1'", changed(every(lambda r: r | {"label": str(r["label"])}))),
    Case("labels by name", changed(every(lambda r: r | {"label": LABELS[r["label"]]})), quick=True),
    Case("labels by name in capitals", changed(every(lambda r: r | {"label": LABELS[r["label"]].upper()}))),
    Case("one class alone", changed(lambda rows: [r for r in rows if r["label"] == 1])),
    Case("a column called position_ids", changed(every(lambda r: r | {"position_ids": [1, 2], "labels": 7}))),
    Case("columns of lists and tables", changed(every(lambda r: r | {"input_ids": [0], "meta": {"a": [1]}}))),
    Case("no idx", changed(every(lambda r: {k: v for k, v in r.items() if k != "idx"}))),
    Case("CSV", as_csv),
    Case("CSV with a byte order mark", lambda folder: raw(b"\xef\xbb\xbf" + csv_of(read_rows(folder / "rte" / "validation.jsonl")),
         "validation.csv")(folder)),
    Case("Parquet", stored("parquet")),
    Case("Parquet, classes in another order", stored("parquet", LABELS[::-1])),
    Case("save_to_disk", stored("disk")),
    Case("save_to_disk, classes in another order", stored("disk", tuple(name.upper() for name in LABELS[::-1]))),
    Case("an example as long as ten", changed(lambda rows: [*rows, rows[0] | {"sentence2": "w5 " * 500}]),
         right=lambda folder, found: None),
    # --- test data
    Case("a test split with hidden labels", predict, right=predictions_are_the_labels, quick=True),
    Case("a test split without labels", predict_on(every(lambda r: {k: v for k, v in r.items() if k != "label"})),
         right=predictions_are_the_labels),
    Case("a test split with labels of another task", predict_on(every(lambda r: r | {"label": "neutral"})), right=predictions_are_the_labels),
    Case("a test text that is null", predict_on(row(1, sentence2=None)), "None for sentence2 in example 1"),
    # --- one's own files
    Case("own names", own_named(lambda r: r)),
    Case("own names in capitals", own_named(lambda r: r | {"label": r["label"].title()}), quick=True),
    Case("own names that are others", own_named(lambda r: r | {"label": {"entailment": "yes"}.get(r["label"], "no")}), "label 'no'|label 'yes'"),
    Case("own file of one class", own_rows([TEXTS | {"label": "a"}] * 4), "the label 'a' alone; a classifier needs two"),
    Case("own file without labels", own_rows([TEXTS] * 4), "column 'label'"),
    Case("own file without text", own_rows([{"label": i % 2, "x": i} for i in range(4)]), "no text column"),
    Case("own file with a missing label", own_rows([TEXTS | {"label": 0.5}, TEXTS | {"label": None}]), "no label in example 1"),
    Case("own CSV with an empty label", own("text,label\nw1,a\nw2,\n", "own.csv"), "no label in example 1"),
    Case("own file of another kind", own("w1\ta\n", "own.tsv"), "own.tsv is no .csv, .json or .jsonl file"),
    Case("own file that is not there", lambda folder: [str(a).replace("own.jsonl", "other.jsonl") for a in own("")(folder)],
         "other.jsonl does not exist"),
    Case("own JSON that is a list", own("[1, 2]", "own.json"), "cannot be read|no text column|column"),
]  # fmt: skip
