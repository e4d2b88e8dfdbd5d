"""Does one DyLoRA run match a whole LoRA sweep? Train and measure the methods of methods.py.

    python -m scripts.study rates    --encoder DIR --data DIR     # choose each method's rate, on a tenth of train
    python -m scripts.study rates --r-max 16 --encoder DIR --data DIR     # the same at a larger r_max, of fewer
    python -m scripts.study leads    --encoder DIR --data DIR     # what else was tried, at one rate on a tenth of train
    python -m scripts.study runs     --encoder DIR --data DIR     # every task, method and seed, on validation
    python -m scripts.study runs     --encoder DIR --data DIR --methods mixed-0.8 --rate 1e-3     # at one's own rate
    python -m scripts.study wide     --encoder DIR --data DIR     # r_max 16 and 64, and all linear layers
    python -m scripts.study language --model DIR --data DIR       # a language model on WebNLG: its rates, then its runs
    python -m scripts.study tables                                # results/study: the pages and curves
    python -m scripts.study cell rte mixed-0.8 0 --encoder DIR --data DIR       # one run again; prints what it found

``DIR`` of --encoder is what `python -m transformers_dylora.minilm DIR` writes, that of --data holds GLUE tasks as
run_glue.py's --dataset_dir (without --data: from the hub), and WebNLG as language.py says; that of --model a checkpoint
or a GGUF file. Runs are appended to results/study/runs.jsonl, one line each; a run that has its line is not repeated,
so an interrupted command goes on where it was. Every run has one core to itself; on a GPU several processes share it,
best under NVIDIA's MPS (one H200 and 22 processes on 16 cores: 150 trainings in 9 minutes).

With ``--keep DIR`` the runs of lora-8 leave their adapters and checkpoints there, and a method whose first part is the
same training goes on from such a checkpoint.
"""

import argparse
import json
import os
from pathlib import Path

from . import cells
from .cells import BUDGETS, LANGUAGE, R_MAX, Cell, chosen_rates, read_records, usual_records
from .methods import CUTS, DEFAULT, METHODS
from .running import ROOT, run_all, run_cell
from .tried import TRIED, named

RESULTS = ROOT / "results" / "study"
OF_LANGUAGE = ("lora-8", DEFAULT, *(name for names in cells.SWEEP.values() for name in names if name != "lora-8"))


FLAGS: dict[str, dict] = {
    "--encoder": dict(
        required=True, dest="base", metavar="DIR", help="the encoder, as transformers_dylora.minilm writes it"
    ),
    "--model": dict(required=True, dest="base", metavar="DIR", help="the language model: a checkpoint or a GGUF file"),
    "--data": dict(metavar="DIR", help="the tasks; default: the hub's"),
    "--tasks": dict(nargs="+", default=list(BUDGETS), choices=list(BUDGETS)),
    "--methods": dict(nargs="+", choices=[*METHODS, *TRIED], help="default: all the command is for"),
    "--seeds": dict(nargs="+", type=int, help="default: 0 1 2; of a language model 0 1"),
    "--rate": dict(type=float, help="instead of the chosen one"),
    "--r-max": dict(type=int, default=R_MAX, choices=[R_MAX, *cells.WIDE_RANKS], help="as in the tables of r_max"),
    "--keep": dict(metavar="DIR", help="for adapters and checkpoints of lora-8"),
    "--processes": dict(type=int, default=os.cpu_count(), help="default: as many as cores"),
    "--results": dict(default=str(RESULTS), metavar="DIR", help="where runs.jsonl and the tables are"),
}
MANY = ("--data", "--keep", "--processes", "--results")
COMMANDS = {
    "rates": ("--encoder", "--methods", "--r-max", *MANY),
    "leads": ("--encoder", "--methods", *MANY),
    "runs": ("--encoder", "--tasks", "--methods", "--seeds", "--rate", *MANY),
    "wide": ("--encoder", "--methods", *MANY),
    "language": ("--model", "--methods", "--seeds", "--rate", *MANY),
    "tables": ("--results",),
    "cell": ("--data", "--rate", "--r-max", "--keep", "--results"),
}


def line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, flags in COMMANDS.items():
        command = commands.add_parser(name)
        for flag in flags:
            command.add_argument(flag, **FLAGS[flag])
    command.add_argument("cell", nargs="*", metavar="task method seed", help="which one")
    command.add_argument("--encoder", metavar="DIR", help="the encoder")
    command.add_argument("--model", metavar="DIR", help="the language model, for webnlg")
    command.add_argument("--held-out", action="store_true", help="measure on a tenth of train")
    command.add_argument("--targets", choices=[cells.USUAL_TARGETS, cells.ALL_LINEAR], help="what is adapted")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = line_parser()
    options = parser.parse_args(argv)
    # The workers inherit this: one core each.
    os.environ["OMP_NUM_THREADS"] = "1"
    file = Path(options.results) / "runs.jsonl"
    if options.command == "tables":
        from .tables import write_tables

        return write_tables(Path(options.results), read_records(file))
    if options.command == "rates":
        methods = options.methods or [*(METHODS if options.r_max == R_MAX else cells.WIDE_METHODS)]
        if small := [name for name in methods if options.r_max > R_MAX > named(name).r]:
            parser.error(
                f"{', '.join(small)}: of a rank of its own, whatever r_max is; leave it out at {options.r_max}."
            )
        return search_rates(options, file, methods, r_max=options.r_max)
    if options.command == "leads":
        return run_all(cells.lead_cells(options.methods or ["lora-8", DEFAULT, *TRIED]), options)
    if options.command == "wide":
        return run_all(cells.wide_cells(read_records(file), options.methods), options)
    if options.command == "language":
        methods, runs = options.methods or OF_LANGUAGE, cells.LANGUAGE_RATE_RUNS
        if options.rate:
            rates = dict.fromkeys(methods, options.rate)
            of_rate = [
                Cell(task, name, seed, options.rate, "held_out", targets=cells.ALL_LINEAR)
                for name in methods
                for task, seed in runs
            ]
            run_all(of_rate, options)
        else:
            search_rates(options, file, methods, runs, cells.ALL_LINEAR)
            rates = chosen_rates(read_records(file), runs)
        seeds = options.seeds or [0, 1]
        return run_all(cells.run_cells([*LANGUAGE], methods, seeds, rates, cells.ALL_LINEAR), options)
    rates = chosen_rates(usual_records(read_records(file)))
    if options.command == "runs":
        methods = options.methods or [*METHODS]
        rates |= dict.fromkeys(methods, options.rate) if options.rate else {}
        without = [name for name in methods if name not in rates]
        if without:
            parser.error(
                f"{', '.join(without)}: no learning rate is chosen yet; run `python -m scripts.study rates` first, or "
                "give --rate."
            )
        return run_all(cells.run_cells(options.tasks, methods, options.seeds or [0, 1, 2], rates), options)
    one_cell(parser, options, rates)


def search_rates(
    options, file: Path, methods, runs=None, targets: str = cells.USUAL_TARGETS, r_max: int = R_MAX
) -> None:
    """Measure until every method's grid is closed; the next rate of a grid follows from the scores of the last."""
    while missing := cells.rate_cells(methods, read_records(file), runs, targets, r_max):
        run_all(missing, options)


def one_cell(parser, options, rates: dict[str, float]) -> None:
    known = {**METHODS, **CUTS, **TRIED}
    if len(options.cell) != 3 or options.cell[0] not in {**BUDGETS, **LANGUAGE} or options.cell[1] not in known:
        parser.error(
            f"cell needs a task ({', '.join([*BUDGETS, *LANGUAGE])}), a method ({', '.join(known)}) and a seed."
        )
    task, name, seed = options.cell
    needed = "model" if task in LANGUAGE else "encoder"
    base = getattr(options, needed)
    if not base:
        parser.error(f"{task} needs --{needed}, the directory of its model.")
    trained = CUTS[name].of if name in CUTS else name
    if not options.rate and (trained not in rates or task in LANGUAGE):
        parser.error(f"{trained}: no learning rate is chosen yet; give --rate.")
    cell = Cell(
        task,
        trained,
        int(seed),
        options.rate or rates[trained],
        "held_out" if options.held_out else "validation",
        options.r_max,
        options.targets or (cells.ALL_LINEAR if task in LANGUAGE else cells.USUAL_TARGETS),
    )
    for found in run_cell(cell, base, options.data, options.keep):
        if found["method"] == name:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
