"""``dylora squeeze``: a LoRA of anybody's, its components ordered, measured where there are data, and cut."""

import tempfile
from dataclasses import replace
from pathlib import Path

from .adapters.export import EXPORTED, copy_tokenizer, export_adapter
from .adapters.placing import free_directory
from .adapters.squeeze import Size, rank_sizes, squeeze_adapter
from .checks import check_int
from .choosing import chosen, refuse_unused, why
from .report.tables import print_grid, print_table


def squeeze(args) -> None:
    if args.rank is None and args.data is None and args.max_parameters is None:
        raise ValueError("Give the rank with --rank or --max-parameters, or --data to choose it by.")
    if args.rank is not None:
        refuse_unused(args, args.rank, "within", "max_parameters")
    elif args.data is None and args.within is not None:
        raise ValueError("--within compares the ranks' scores; give the data to measure them on with --data.")
    if args.importance is not None and args.strengths is not None:
        raise ValueError("--importance spreads ranks over the layers, --strengths is for ranks as they are; give one.")
    runs = any(file is not None for file in (args.data, args.importance, args.strengths))
    if not runs and (args.base or args.labels):
        raise ValueError(
            "--base and --labels are for running the model; give --data, --importance or --strengths, or leave them "
            "out."
        )
    if Path(args.to).resolve() == Path(args.adapter).resolve():
        raise ValueError(f"--to {args.to} is the adapter itself; give another directory.")
    free_directory(args.to, EXPORTED)
    for flag in ("data", "importance", "strengths"):
        if (file := getattr(args, flag)) is not None and not Path(file).is_file():
            raise ValueError(f"--{flag} {file} does not exist; give a CSV or JSON-lines file.")
    rank, results, adapted = args.rank, None, None
    with tempfile.TemporaryDirectory() as directory:
        kept = squeeze_adapter(args.adapter, directory)
        if rank is not None:
            check_int("rank", rank, 1, max(kept), f"the adapter in {args.adapter} can be cut to 1..{max(kept)}.")
        if runs:
            from transformers_dylora.squeezing import Adapted

            labels = tuple(name.strip() for name in args.labels.split(",")) if args.labels else ()
            adapted = Adapted.load(directory, args.base, labels)
        if adapted and args.importance:
            adapted.spread_by_importance(args.importance)
        if adapted and args.strengths:
            adapted.fit_strengths(args.strengths)
        sizes = rank_sizes(directory)
        _print_sizes(sizes, None if args.importance else kept)
        if adapted and args.data:
            results, found = adapted.measure(args.data), None
            if rank is None:
                found = chosen(args, results)
                rank, results = found.rank, replace(results, selected_rank=found)
            print_table(results)
            if found is not None:
                print(f"rank {rank}: {why(results, found)}")
        if rank is None:
            rank = _largest(sizes, args.max_parameters)
        copy_tokenizer(Path(args.adapter), Path(directory))
        export_adapter(directory, args.to, rank, results, args.license)
    print(f"written to {args.to}: the adapter at rank {rank}, in PEFT's format; README.md says how to load it")


def _print_sizes(sizes: dict[int, Size], kept: dict[int, float] | None) -> None:
    """``kept``: what each rank keeps of the update; None where importance spread the ranks over the layers."""
    if kept is not None:
        rows = [[str(b), f"{size.parameters:,}", f"{100 * kept[b]:.1f}"] for b, size in sizes.items()]
        print_grid("kept: of the update's squared norm, in percent", ["rank", "parameters", "kept"], rows)
        return
    rows = [[str(b), f"{size.parameters:,}", str(size.layers), str(size.most)] for b, size in sizes.items()]
    head = ["rank", "parameters", "layers", "most in one"]
    print_grid("at most as many parameters as at that rank, in the layers where they matter", head, rows)


def _largest(sizes: dict[int, Size], parameters: int) -> int:
    fitting = [b for b, size in sizes.items() if size.parameters <= parameters]
    if not fitting:
        smallest = min(size.parameters for size in sizes.values())
        raise ValueError(f"No rank has {parameters:,} parameters or fewer; the smallest has {smallest:,}.")
    return fitting[-1]
