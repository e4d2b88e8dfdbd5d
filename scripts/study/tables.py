"""The study's pages and curves, from results/study/runs.jsonl: README.md, tables.md, choosing.md."""

from collections import defaultdict
from pathlib import Path

from loralib.files import write_text
from loralib.report.tables import markdown_table

from ..pages import page
from .averages import average_tables, beside, peer_on, with_most_seeds
from .cells import area, usual_records
from .choosing import choosing_page
from .curves import draw
from .front import HALVING, front_page
from .headline import judged_beside
from .held_out import BAR
from .methods import DEFAULT, SHOWN
from .naming import HEAD, NAMES, called, order, spans, with_error
from .provenance import the_runs
from .shown import AVERAGED, Found, by_row, device_of, scores_by_device
from .wide import rank_tables, target_tables

WORDS = [
    "- **r_max**: the highest rank, which an adapter is made for. **component**: a row of A with its column of B; a "
    "layer has r_max of them, and rank b uses b.",
    "- **strength**: the factor of the update B A x, alpha / r in plain LoRA; a rule in the rank b where it differs. "
    "**alpha/b**: alpha over the rank in use; **alpha/r**: alpha over r_max, the same at every rank.",
    "- **cut**: the first b components as they were trained, in no order. **reduced by SVD**: of each layer's update "
    "the b largest singular values, as PEFT's `convert_to_lora` keeps them. **one threshold** (PARA, arXiv "
    "2604.27796): those above one threshold over all layers, at rank b as many in all as b in each layer. **one share "
    "of energy** (`convert_to_lora` with a threshold): of each layer those that make up one share of its squared "
    "singular values. **by Fisher information**: the components that the loss depends on most, over all layers. "
    "**strengths fitted**: each layer's strength at each rank learnt after the training.",
    "- **LoRA-Squeeze** (arXiv 2602.10993): the LoRA of rank 8 for 0.8 of the steps, reduced by SVD to a rank, then "
    "that rank alone; our settings. **AdaLoRA** (arXiv 2303.10512): a training for each rank, in the "
    "end with as many components over all layers; by PEFT, at its authors' settings for GLUE but for the rate. They "
    "train CoLA for 25 epochs, here it is 4.",
    "- **MatryoshkaLoRA** (arXiv 2605.07850): trained through the sum over ranks 1, 2, 4 and 8, measured at each rank "
    "r with its own scale, 1, 1/r or 1/sqrt(r), at its authors' settings: no alpha, lora_A drawn with a bound of "
    "1/sqrt(r). **fixed gate**: the sum or mean of several ranks' gates for all updates, at settings of ours.",
    "- **DyLoRA as released**: a rank for each step, its component alone trained (frozen). **per step**: the "
    "components up to it. **per example**: a rank for each example.",
    "- **mean**: the plain mean of ranks 1, 2, 4 and 8. **AURAC**: the area under score over rank, divided by the "
    "span: rank 1 counts 7 percent, rank 8 29, rank 4 43. Of a row with one rank it is the score there.",
]


def task_tables(founds: dict[str, Found], task: str, records: list[dict]) -> list[str]:
    """Every row that was measured on the task, a table for each device."""
    rates = defaultdict(set)
    for record, row, _ in by_row(records):
        rates[row, record["task"], device_of(record)].add(record["rate"])
    lines = []
    for device, found in founds.items():
        rows = []
        for method in order(m for t, m in found if t == task):
            runs = beside(found, peer_on(founds, device), method, task)
            cells = [with_error([curve[b] for curve in runs.values()]) for b in SHOWN]
            cells.append(with_error([area(curve) for curve in runs.values()]))
            at = ", ".join(f"{rate:g}" for rate in sorted(rates[method, task, device]))
            rows.append([called(method), *cells, spans(runs), at])
        if rows:
            head = [*HEAD, "AURAC", "seeds", "rate"]
            lines += [f"### {NAMES[task]}, on: {device}", "", markdown_table(head, rows, "l"), ""]
    return lines


def all_tables(founds: dict[str, Found], records: list[dict], everything: list[dict]) -> list[str]:
    """The second page: every row, by device and by task; larger r_max and other targets."""
    lines = [
        "# All tables of the study",
        "",
        "What [the study](README.md) compares, row by row. What its words mean, beside those that stand there:",
        "",
        *WORDS,
        "",
    ]
    for peer in ("sweep", BAR):
        for device in with_most_seeds(founds, peer) if founds else ():
            if tables := average_tables(founds[device], records, peer):
                title = f"## Mean of {len(AVERAGED)} tasks, beside {called(peer)}, on: {device}"
                lines += [title, "", "±: half of a 95 percent t-interval over seeds.", "", *tables]
    for device in with_most_seeds(founds, "sweep", HALVING)[:1] if founds else ():
        peers = {"sweep": "the sweep", "plain-sweep": "the plain sweep", BAR: "LoRA r=8, reduced by SVD"}
        if tables := judged_beside(founds[device], HALVING, peers | {DEFAULT: "our default"}):
            lines += [f"## Halving, judged as the default is, on: {device}", "", *tables]
    lines += [
        "## By task",
        "",
        "Mean ± standard error over the seeds that stand in the row; only rows of the same seeds compare. They are "
        "those that the sweep has on the device, or where it has few, the LoRA reduced by SVD.",
        "",
    ]
    for task in AVERAGED:
        lines += task_tables(founds, task, records)
    return [*lines, *rank_tables(everything), *target_tables(everything), *the_runs(everything)]


def write_tables(directory: Path, records: list[dict]) -> None:
    """The pages and the curves from the records."""
    usual = usual_records(records)
    founds = scores_by_device(usual)
    if founds:
        draw(next(iter(founds.values())), directory)
    for name, lines in [
        ("README.md", front_page(founds, usual, records)),
        ("tables.md", all_tables(founds, usual, records)),
        ("choosing.md", choosing_page(usual, records)),
    ]:
        write_text(directory / name, page(lines).rstrip("\n") + "\n")
