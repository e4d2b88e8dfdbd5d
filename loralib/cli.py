"""The ``dylora`` command: train, and what to do with a run afterwards. It parses and prints; the work is done
elsewhere.

dylora train FLAGS                  train and measure every rank; FLAGS may begin with a YAML file of settings
dylora report RUN [RUN ...]         tables in the terminal; Markdown, CSV, PNG, SVG and an HTML page
dylora select RUN                   the smallest rank that is as good as the best, and why
dylora export RUN --rank 4 --to DIR a PEFT adapter at that rank, with a model card
dylora merge RUN --rank 4 --to DIR  a plain transformers model
dylora squeeze ADAPTER --to DIR     order and cut a LoRA that was trained elsewhere
dylora inspect DIR                  what an adapter's directory holds
dylora completion SHELL             what the shell needs to complete these
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .choosing import chosen, refuse_unused, why
from .conflict import warn_of_other_loralib
from .extras import missing
from .version import __version__

if TYPE_CHECKING:
    from .report.results import RankResults


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns the exit code: 0, or 2 with one sentence on stderr for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return _train(argv[1:])  # its flags are transformers' and not known here
    args = _parser().parse_args(argv)
    warn_of_other_loralib()
    try:
        from .adapters.hub import local

        for name in ("run_directory", "adapter", "directory"):  # directories, or names on the hub
            if hasattr(args, name):
                setattr(args, name, str(local(getattr(args, name))))
        return args.run(args) or 0
    except ImportError as error:
        print(f"dylora: {missing(error)}", file=sys.stderr)
    except OSError as error:
        print(f"dylora: {error if error.filename is None else f'{error.filename}: {error.strerror}.'}", file=sys.stderr)
    except ValueError as error:
        print(f"dylora: {error}", file=sys.stderr)
    except SafetensorError as error:
        print(f"dylora: weights could not be read or written ({error}).", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dylora", description="Train one LoRA adapter, then use it at any rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  dylora train --model_name_or_path roberta-base --task_name rte --output_dir rte/model\n"
        "  dylora report mnli/model\n  dylora select mnli/model --within 0.5\n"
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

    train = command(
        "train",
        None,
        "train an adapter and measure every rank",
        "dylora train --model_name_or_path roberta-base --train_file my.csv --output_dir out",
    )
    train.add_argument("flags", nargs="*", help="dylora train --help lists them")

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
        sub.add_argument(
            "run_directory", metavar="RUN", help="output directory of a run, any adapter's, or its name on the hub"
        )
        sub.add_argument("--rank", required=True, help="a rank, or auto: what `dylora select` chooses")
        sub.add_argument("--to", required=True, metavar="DIR", help="a new or empty directory, or an earlier export")
        _add_choice(sub)
        _add_license(sub)
        if name == "export":
            sub.add_argument(
                "--for", dest="server", choices=["vllm"], help="check that this server would serve it right"
            )
        if name == "merge":
            sub.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")

    squeeze = command(
        "squeeze",
        _squeeze,
        "order and cut a LoRA that was trained elsewhere, in PEFT's format",
        "dylora squeeze my-lora --data validation.jsonl --within 1se --to small",
    )
    squeeze.add_argument("adapter", metavar="ADAPTER", help="the adapter's directory")
    squeeze.add_argument(
        "--rank", type=int, help="the rank to cut it to; default: chosen by --data or --max-parameters"
    )
    squeeze.add_argument("--to", required=True, metavar="DIR", help="a new or empty directory, or an earlier export")
    squeeze.add_argument(
        "--data",
        metavar="FILE",
        help="examples to measure every rank on: text and label, prompt and completion, or text",
    )
    squeeze.add_argument(
        "--importance",
        metavar="FILE",
        help="examples of the training data: ranks then keep the components of all layers that matter most on them",
    )
    squeeze.add_argument(
        "--strengths",
        metavar="FILE",
        help="examples of the training data: on them each layer learns how strong its update should be at each rank",
    )
    squeeze.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the adapter names)")
    squeeze.add_argument("--labels", help="a classifier's label names, in the order of its outputs, as in no,yes")
    _add_choice(squeeze, of_splits=False)
    _add_license(squeeze)

    inspect = command("inspect", _inspect, "what an adapter's directory holds", "dylora inspect rte/model")
    inspect.add_argument("directory", metavar="DIR")

    completion = command(
        "completion", _completion, "print what a shell needs to complete dylora", 'eval "$(dylora completion bash)"'
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _add_choice(parser, of_splits: bool = True) -> None:
    parser.add_argument(
        "--within",
        help="1se (default): one standard error of the paired difference to the best; or points of 0-100",
    )
    parser.add_argument(
        "--max-parameters", type=int, metavar="N", help="only ranks whose adapter has at most N parameters"
    )
    if of_splits:
        parser.add_argument("--split", help="the split to choose on (default: the run's first)")


def _add_license(parser) -> None:
    parser.add_argument("--license", metavar="NAME", help="the licence that the model card names, as in apache-2.0")


def _train(flags: list[str]) -> int:
    try:
        from transformers_dylora.run_glue import train
        from transformers_dylora.stopping import exit_code
    except ImportError as error:
        print(f"dylora: {missing(error)}", file=sys.stderr)
        return 2
    return exit_code(lambda: train(flags), "dylora train")


def _report(args) -> None:
    from .report.curves import summary_rows
    from .report.results import RankResults
    from .report.tables import print_grid, print_table
    from .report.writing import write_report

    runs = [RankResults.read(path) for path in args.runs]
    to = Path(args.to or (runs[0].directory if len(runs) == 1 else None) or "dylora_report")
    for results in runs:
        print_table(results)
    curves = write_report(runs, to)
    if len(runs) > 1:
        head, rows = summary_rows(curves, short=True)
        print_grid("mean over seeds, with its standard error", head, rows, left=(0, 1))
    print(f"written to {to}: rank_results.md, rank_results.csv, rank_curve.png, .svg and .pdf, report.html")


def _select(args) -> None:
    from .report.results import RankResults

    results = RankResults.read(args.run_directory)
    if _of_another(results):
        raise _another(args.run_directory)
    found = chosen(args, results)
    print(f"rank {found.rank}")
    print(why(results, found))


def _rank_of(args) -> tuple[int, RankResults | None]:
    """The rank to write, and the run's results if the directory is a run's."""
    from dataclasses import replace

    from .report.results import FILE, RankResults

    directory = Path(args.run_directory)
    results = RankResults.read(directory) if (directory / FILE).exists() else None
    other = results is not None and _of_another(results)
    if args.rank != "auto":
        try:
            rank = int(args.rank)
        except ValueError:
            raise ValueError(f"--rank is {args.rank!r}; give a rank or auto.") from None
        refuse_unused(args, rank, "within", "max_parameters", "split")
        return rank, None if other else results
    if other:
        raise _another(directory)
    if results is None:
        raise FileNotFoundError(f"{directory} holds no {FILE} to choose a rank from; give --rank a number.")
    found = chosen(args, results)
    print(f"rank {found.rank}: {why(results, found)}")
    return found.rank, replace(results, selected_rank=found)


def _of_another(results: RankResults) -> bool:
    """Whether a run's table is of other weights than those that lie beside it."""
    from .adapters.directory import hash_of_weights

    beside = hash_of_weights(results.directory or "")
    return None not in (results.adapter, beside) and results.adapter != beside


def _another(directory) -> ValueError:
    return ValueError(
        f"The adapter in {directory} is not the one that its rank_results.json is of: measure it with dylora train "
        f"--do_eval --lora_path {directory} --output_dir {directory}, or give a rank."
    )


def _warn_of_plain_lora(directory: str, rank: int) -> None:
    """Say on stderr that a LoRA of PEFT's may be unfit for cutting: its files do not tell."""
    from .adapters.directory import read_configs

    config, facts = read_configs(directory)
    if not {"sampling", "ordered"} & facts.keys() and rank < config["r"]:
        print(
            f"dylora: {directory} does not say that it was trained for ranks below {config['r']}. If it was not, use "
            "dylora squeeze, which orders its components before it cuts them.",
            file=sys.stderr,
        )


def _export(args) -> None:
    from .adapters.export import export_adapter

    rank, results = _rank_of(args)
    config = export_adapter(args.run_directory, args.to, rank, results, args.license, args.server)
    print(f"written to {args.to}: the adapter at rank {rank}, in PEFT's format; README.md says how to load it")
    _warn_of_plain_lora(args.run_directory, rank)
    if args.server == "vllm":
        from .adapters.serving import check_for_vllm

        print(f"for vLLM: --enable-lora --max-lora-rank {check_for_vllm(config, args.to)}")


def _merge(args) -> None:
    from .adapters.export import export_merged

    rank, results = _rank_of(args)
    base = export_merged(args.run_directory, args.to, rank, args.base, results, args.license)
    print(f"written to {args.to}: {base} with the adapter at rank {rank} merged in")
    _warn_of_plain_lora(args.run_directory, rank)


def _squeeze(args) -> None:
    from .squeezing import squeeze

    squeeze(args)


def _completion(args) -> None:
    import shtab
    from transformers_dylora.arguments import line_parser

    parser, commands = _parser(), {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = action.choices
    for action in line_parser()._actions:
        if action.dest != "help":
            commands["train"]._add_action(action)
    kinds = {"RUN": shtab.DIRECTORY, "DIR": shtab.DIRECTORY, "ADAPTER": shtab.DIRECTORY, "FILE": shtab.FILE}
    for command in commands.values():
        for action in command._actions:
            if action.metavar in kinds or action.dest.endswith(("_file", "_dir", "_path")):
                action.complete = kinds.get(action.metavar, shtab.FILE)
    print(shtab.complete(parser, args.shell))


def _inspect(args) -> None:
    from .adapters.directory import describe_adapter
    from .report.tables import print_grid

    facts = describe_adapter(args.directory)
    shown = ("base", "rank", "r_max", "lora_alpha", "scaling", "target_modules", "modules_to_save", "task", "labels")
    for name in shown:
        value = facts.get(name)
        value = list(dict.fromkeys(value)) if isinstance(value, list) else value
        if name == "target_modules" and isinstance(value, list):
            value = list(dict.fromkeys(target.rpartition(".")[2] for target in value))
        if value not in (None, [], {}):
            print(f"{name:16} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if facts.get("strength_at"):
        print(f"{'strengths':16} of each rank's own, learnt after the training")
    print(f"{'parameters':16} {facts['adapter_parameters']:,} in the adapter, {facts['head_parameters']:,} in the head")
    longest = max([*facts["norms"], 1e-12])
    rows = [
        [str(b), f"{norm:.4f}", f"{'█' * round(30 * norm / longest):30}"] for b, norm in enumerate(facts["norms"], 1)
    ]
    print_grid(
        "norm of each component's update, root mean square over layers", ["component", "norm", ""], rows, left=(2,)
    )


if __name__ == "__main__":
    sys.exit(main())
