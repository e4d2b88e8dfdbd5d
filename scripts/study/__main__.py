"""Does one DyLoRA run match a whole LoRA sweep? Train and measure the methods of methods.py on GLUE data.

    python -m scripts.study rates  --encoder DIR --data DIR     # choose each method's rate, on a tenth of train
    python -m scripts.study leads  --encoder DIR --data DIR     # what else was tried, at one rate on a tenth of train
    python -m scripts.study runs   --encoder DIR --data DIR     # every task, method and seed, on validation
    python -m scripts.study runs   --encoder DIR --data DIR --methods mixed-0.8 --rate 1e-3     # at a rate of one's own
    python -m scripts.study tables                              # results/study: tables, curves, cost
    python -m scripts.study cell rte mixed-0.8 0 --encoder DIR --data DIR       # one run again; prints what it found

``DIR`` of --encoder is what `python -m transformers_dylora.minilm DIR` writes, that of --data holds GLUE tasks as
run_glue.py's --dataset_dir (without --data: from the hub). Runs are appended to results/study/runs.jsonl, one line
each; a run that has its line is not repeated, so an interrupted command goes on where it was. Every run has one core to
itself.

With ``--keep DIR`` the runs of lora-8 leave their adapters and checkpoints there, and a method whose first part is the
same training goes on from such a checkpoint.
"""

import argparse
import json
import os
from pathlib import Path

from .cells import BUDGETS, Cell, chosen_rates, lead_cells, rate_cells, read_records, run_cells
from .methods import CUTS, DEFAULT, METHODS, TRIED
from .running import ROOT, run_all, run_cell

RESULTS = ROOT / "results" / "study"


def line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["rates", "leads", "runs", "tables", "cell"])
    parser.add_argument("cell", nargs="*", metavar="task method seed", help="for cell: which one")
    parser.add_argument("--encoder", help="directory of the encoder")
    parser.add_argument("--data", help="directory of the GLUE tasks; default: the hub's")
    parser.add_argument("--tasks", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *TRIED], help="default: all the command is for")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, help="for runs and cell: instead of the chosen one")
    parser.add_argument("--held-out", action="store_true", help="for cell: measure on a tenth of train")
    parser.add_argument("--keep", help="directory for adapters and checkpoints of lora-8")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", default=str(RESULTS), help="where runs.jsonl and the tables are")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = line_parser()
    options = parser.parse_args(argv)
    # The workers inherit this: one core each.
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.command == "tables":
        from .tables import write_tables

        return write_tables(Path(options.results), read_records(Path(options.results) / "runs.jsonl"), BUDGETS)
    if not options.encoder:
        parser.error(f"{options.command} needs --encoder; `python -m transformers_dylora.minilm DIR` writes one.")
    records = read_records(Path(options.results) / "runs.jsonl")
    rates = chosen_rates(records)
    if options.command == "rates":
        # The next rate of a grid follows from the scores of the last.
        while missing := rate_cells(options.methods or [*METHODS], read_records(Path(options.results) / "runs.jsonl")):
            run_all(missing, options)
        return None
    if options.command == "leads":
        return run_all(lead_cells(options.methods or ["lora-8", DEFAULT, *TRIED]), options)
    if options.command == "runs":
        methods = options.methods or [*METHODS]
        rates |= dict.fromkeys(methods, options.rate) if options.rate else {}
        without = [name for name in methods if name not in rates]
        if without:
            parser.error(
                f"{', '.join(without)}: no learning rate is chosen yet; run `python -m scripts.study rates` first, or "
                "give --rate."
            )
        return run_all(run_cells(options.tasks, methods, options.seeds, rates), options)
    if len(options.cell) != 3 or options.cell[0] not in BUDGETS or options.cell[1] not in {**METHODS, **CUTS, **TRIED}:
        parser.error(
            f"cell needs a task ({', '.join(BUDGETS)}), a method ({', '.join([*METHODS, *CUTS, *TRIED])}) and a seed."
        )
    task, name, seed = options.cell
    trained = CUTS[name].of if name in CUTS else name
    if not options.rate and trained not in rates:
        parser.error(f"{trained}: no learning rate is chosen yet; give --rate.")
    split = "held_out" if options.held_out else "validation"
    cell = Cell(task, trained, int(seed), options.rate or rates[trained], split)
    for found in run_cell(cell, options.encoder, options.data, options.keep):
        if found["method"] == name:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
