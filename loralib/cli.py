"""The ``dylora`` command: what to do with a run after training.

dylora report RUN [RUN ...]         tables in the terminal; Markdown, CSV, PNG, SVG and an HTML page
dylora select RUN                   the smallest rank that is as good as the best, and why
dylora export RUN --rank 4 --to DIR a PEFT adapter at that rank, with a model card
dylora merge RUN --rank 4 --to DIR  a plain transformers model
dylora inspect DIR                  what an adapter's directory holds
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from .conflict import warn_of_other_loralib
from .version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit code: 0, or 2 with one sentence on stderr for a user's mistake."""
    parser = _parser()
    args = parser.parse_args(argv)
    warn_of_other_loralib()
    try:
        return args.run(args) or 0
    except ImportError as error:
        print(f"dylora: {error.name} is not installed; this command needs pip install 'dylora[nlu]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        message = (
            str(error)
            if not isinstance(error, OSError) or error.filename is None
            else f"{error.filename}: {error.strerror}"
        )
        print(f"dylora: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dylora", description="Use what one DyLoRA training gave, at any rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  dylora report mnli/model\n  dylora select mnli/model --within 0.5\n"
        "  dylora export mnli/model --rank auto --to adapter\n  dylora inspect adapter",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dylora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, summary, example):
        sub = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
        )
        sub.set_defaults(run=run)
        return sub

    report = command(
        "report",
        _report,
        "tables and curves of one run or several",
        "dylora report rte/seed0 rte/seed1 cola/model --to report",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a run")
    report.add_argument(
        "--to", metavar="DIR", help="where the files go (default: the run, or ./dylora_report for several)"
    )

    select = command(
        "select",
        _select,
        "the smallest rank that is as good as the best",
        "dylora select rte/model --within 0.5 --max-parameters 40000",
    )
    select.add_argument("run_directory", metavar="RUN", help="output directory of a run")
    _add_choice(select)

    for name, run, summary in (
        ("export", _export, "write a PEFT adapter at one rank"),
        ("merge", _merge, "write a plain transformers model at one rank"),
    ):
        sub = command(name, run, summary, f"dylora {name} rte/model --rank auto --to rte-{name}")
        sub.add_argument("run_directory", metavar="RUN", help="output directory of a run, or any adapter's directory")
        sub.add_argument("--rank", required=True, help="a rank, or auto: what `dylora select` chooses")
        sub.add_argument("--to", required=True, metavar="DIR", help="a new or empty directory, or an earlier export")
        _add_choice(sub)
        if name == "merge":
            sub.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")

    inspect = command("inspect", _inspect, "what an adapter's directory holds", "dylora inspect rte/model")
    inspect.add_argument("directory", metavar="DIR")
    return parser


def _add_choice(parser) -> None:
    parser.add_argument(
        "--within",
        default="1se",
        help="1se (default): one standard error of the paired difference to the best; or points of 0-100",
    )
    parser.add_argument(
        "--max-parameters", type=int, metavar="N", help="only ranks whose adapter has at most N parameters"
    )
    parser.add_argument("--split", help="the split to choose on (default: the run's first)")


# --- report, select -----------------------------------------------------------------------------------


def _report(args) -> None:
    from .files import write_atomically, write_text
    from .report.curves import averages, curves, read_run, runs_to_csv
    from .report.page import page
    from .report.plots import plot_curves
    from .report.tables import print_table, to_csv, to_markdown

    runs = [read_run(path) for path in args.runs]
    found = curves(runs)
    found += averages(found)
    one = len(runs) == 1
    to = Path(args.to or (args.runs[0] if one else "dylora_report"))
    for results in runs:
        print_table(results)
    if not one:
        _print_summary(found)
    selected = (runs[0].get("selected_rank") or {}).get("rank") if one else None
    markdown = "\n".join(to_markdown(results) for results in runs)
    if one:
        table = to_csv(runs[0])
    else:
        table = runs_to_csv(runs)
        markdown = _summary_markdown(found) + "\n" + markdown
    write_text(to / "rank_results.md", markdown)
    write_text(to / "rank_results.csv", table)
    for kind in ("png", "svg"):
        write_atomically(to / f"rank_curve.{kind}", lambda file, kind=kind: plot_curves(found, file, selected, kind))
    write_text(to / "report.html", page(runs, found))
    print(f"written to {to}: rank_results.md, rank_results.csv, rank_curve.png, rank_curve.svg, report.html")


def _summary_rows(found) -> list[list[str]]:
    ranks = sorted({b for curve in found for b in curve.ranks})
    rows = [["task", "method", "seeds", *(f"r={b}" for b in ranks)]]
    for curve in found:
        by_rank = dict(
            zip(curve.ranks, zip(curve.means, curve.errors or [None] * len(curve.ranks), strict=True), strict=True)
        )
        cells = []
        for b in ranks:
            mean, error = by_rank.get(b, (None, None))
            cells.append("" if mean is None else f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else ""))
        rows.append([" ".join(filter(None, (curve.task, curve.split))), curve.method, str(curve.seeds), *cells])
    return rows


def _summary_markdown(found) -> str:
    head, *rows = _summary_rows(found)
    lines = [head, ["---"] * len(head), *rows]
    return "# All runs\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _print_summary(found) -> None:
    from rich.console import Console
    from rich.table import Table

    head, *rows = _summary_rows(found)
    table = Table(title="mean over seeds, with its standard error")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _select(args) -> None:
    from .report.curves import choose, read_run

    results = read_run(args.run_directory)
    chosen = choose(results, args.split, _within(args.within), args.max_parameters)
    print(f"rank {chosen['rank']}")
    print(_why(results, chosen))


def _why(results: dict, chosen: dict) -> str:
    error = chosen["standard_error"]
    spread = f" (standard error of the difference {100 * error:.2f})" if error is not None else ""
    return f"{results['task']}, {chosen['split']}: {chosen['rule']}; {chosen['metric']} {100 * chosen['score']:.2f}{spread}"


def _within(text: str) -> float | str:
    if text == "1se":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--within is {text!r}; give 1se or a number of points, as in 0.5.") from None


# --- export, merge, inspect ---------------------------------------------------------------------------


def _rank_of(args) -> tuple[int, dict | None]:
    """The rank to write, and the run's results if the directory is a run's."""
    from .report.curves import choose, read_run

    directory = Path(args.run_directory)
    results = read_run(directory) if (directory / "rank_results.json").exists() else None
    if args.rank != "auto":
        try:
            return int(args.rank), results
        except ValueError:
            raise ValueError(f"--rank is {args.rank!r}; give a rank or auto.") from None
    if results is None:
        raise FileNotFoundError(f"{directory} holds no rank_results.json to choose a rank from; give --rank a number.")
    chosen = choose(results, args.split, _within(args.within), args.max_parameters)
    print(f"rank {chosen['rank']}: {_why(results, chosen)}")
    return chosen["rank"], results | {"selected_rank": chosen}


def _free(directory: str, made_by: str) -> Path:
    """``directory`` if writing there loses nothing but what the same command wrote before."""
    path = Path(directory).resolve()
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    own = path / "dylora.json"
    if own.is_file() and json.loads(own.read_text(encoding="utf-8")).get("made_by") == made_by:
        return path
    raise ValueError(f"--to {directory} holds other files; give a new or empty directory.")


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model"):
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _export(args) -> None:
    from .adapters.card import model_card
    from .adapters.directory import cut_adapter, read_configs
    from .files import write_text

    source, target = Path(args.run_directory), _free(args.to, "dylora export")
    if target == source.resolve():
        raise ValueError(f"--to {args.to} is the adapter itself; give another directory.")
    rank, results = _rank_of(args)
    cut_adapter(source, target, rank, extra={"made_by": "dylora export"})
    _copy_tokenizer(source, target)
    config, facts = read_configs(target)
    write_text(target / "README.md", model_card(config, facts, results, args.to))
    print(f"written to {args.to}: the adapter at rank {rank}, in PEFT's format; README.md says how to load it")


def _merge(args) -> None:
    import transformers

    from .adapters.card import AUTO, model_card, num_labels
    from .adapters.directory import cut_adapter, read_configs
    from .adapters.store import load_adapter
    from .files import write_text
    from .model import merge

    source, target = Path(args.run_directory), _free(args.to, "dylora merge")
    rank, results = _rank_of(args)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no directory; give a run or an adapter's directory.")
    work = target.with_name(f".{target.name}.adapter")
    try:
        cut_adapter(source, work, rank)  # checks the file and the rank before the base model is fetched
        config, facts = read_configs(work)
        base = args.base or config.get("base_model_name_or_path")
        auto = AUTO.get(config.get("task_type"))
        if base is None or auto is None:
            raise ValueError(
                f"{source} does not say which kind of model it is for; merge it in Python with loralib.merge."
            )
        options = {}
        if config["task_type"] in ("SEQ_CLS", "TOKEN_CLS"):  # the base may carry a head of its own, of another size
            options = {"num_labels": num_labels(facts), "ignore_mismatched_sizes": True}
        transformers.utils.logging.set_verbosity_error()
        try:
            model = getattr(transformers, auto).from_pretrained(base, **options)
        except OSError:
            raise ValueError(
                f"The base model {base!r} is no directory here and not on the hub; name it with --base."
            ) from None
        if facts.get("labels"):
            model.config.id2label = dict(enumerate(facts["labels"]))
            model.config.label2id = {text: i for i, text in enumerate(facts["labels"])}
        load_adapter(model, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    merge(model, inplace=True).save_pretrained(target)
    write_text(target / "dylora.json", json.dumps(facts | {"made_by": "dylora merge"}, indent=2) + "\n")
    _copy_tokenizer(source, target)
    write_text(target / "README.md", model_card(config, facts, results, args.to, merged=True))
    print(f"written to {args.to}: {base} with the adapter at rank {rank} merged in")


def _inspect(args) -> None:
    from rich.console import Console
    from rich.table import Table

    from .adapters.directory import describe_adapter

    found = describe_adapter(args.directory)
    for name in (
        "base",
        "rank",
        "r_max",
        "lora_alpha",
        "scaling",
        "target_modules",
        "modules_to_save",
        "task",
        "labels",
    ):
        value = found.get(name)
        if value not in (None, [], {}):
            print(f"{name:16} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    print(f"{'parameters':16} {found['adapter_parameters']:,} in the adapter, {found['head_parameters']:,} in the head")
    table = Table(title="norm of each component's update, root mean square over layers")
    table.add_column("component", justify="right")
    table.add_column("norm", justify="right")
    table.add_column("")
    for b, norm in enumerate(found["norms"], 1):
        table.add_row(str(b), f"{norm:.4f}", "█" * round(30 * norm / max(*found["norms"], 1e-12)))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
