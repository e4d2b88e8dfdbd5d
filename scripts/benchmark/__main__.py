"""How fast: ours and every peer, in turns, in one process.

    python -m scripts.benchmark --quick              # under 3 minutes on 2 cores: steps, evaluation, files, start-up
    python -m scripts.benchmark --quick --check      # the same; exit code 1 if a ratio got worse than the recorded one
    python -m scripts.benchmark --data DIR           # all of it; DIR holds GLUE's rte and cola (default: from the hub)
    python -m scripts.benchmark --device cuda        # on a GPU

Tables and JSON go to results/benchmark (a GPU's beside the CPU's). The environment: bash -c '. scripts/env.sh
benchmark'.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from . import tables as tables
from .cases import FULL, QUICK
from .growth import grow, plot_growth
from .rows import Options

RESULTS = Path(__file__).parents[2] / "results" / "benchmark"


def line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers, fewer cases")
    parser.add_argument("--check", action="store_true", help="compare with the recorded ratios instead of recording")
    parser.add_argument("--cases", nargs="+", choices=[*FULL, "growth"], help="these alone; others keep their rows")
    parser.add_argument("--data", help="directory of GLUE tasks, as run_glue.py's --dataset_dir")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--results", default=str(RESULTS), help="where the tables go")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = line_parser()
    args = parser.parse_args(argv)
    options = Options(args.device, args.quick, args.data)
    cases = QUICK if options.quick else FULL
    file = Path(args.results) / f"{args.device.split(':')[0]}{'-quick' if args.quick else ''}.json"
    if args.check and not file.exists():
        parser.error(f"--check compares with {file}, which is not there; run without --check first.")
    command = sys.argv[1:] if argv is None else argv
    worse = []
    for name in [name for name in args.cases or cases if name in cases]:
        start, rows = time.perf_counter(), []
        for row in cases[name](options):
            rows.append(row)
            print(tables.line(row), flush=True)
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        if args.check:
            worse += tables.regressions(rows, tables.read(file)["rows"])
        else:  # case by case: an interrupted run keeps what it has measured
            tables.record(file, rows, None, options, command)
    if args.check:
        print("\n".join(worse) or "no ratio is worse than the recorded one")
        return 1 if worse else 0
    if not args.quick and (args.cases is None or "growth" in args.cases):
        growth = grow(options)
        plot_growth(growth, file.with_name(file.stem + "-growth.png"))
        tables.record(file, [], growth, options, command)
    tables.write_readme(file.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
