"""How time and memory grow with r_max, width, length and data: the points of the plot, and why they lie so."""

import subprocess
import sys
from pathlib import Path

import torch

import loralib as lora
from loralib.training.batching import epoch_order

from . import peers as peers
from .peers import MINILM, Shape
from .rows import Options, median
from .steps import batch, drawn, training_step
from .timing import alternate, paired_ratio, saved_bytes

WHY = {
    "r_max": "The update costs r_max / width of what its base layer costs, so the step hardly grows with r_max; "
    "beside PEFT's it stays where it is, because both do the same products and ours scales r_max columns where PEFT "
    "scales the output.",
    "width": "The base layers' products grow with the square of the width, all else with the width; the adapter's "
    "share shrinks.",
    "length": "Up to some 256 tokens time grows as the text does, beyond it attention's square shows; padding costs "
    "as much as text, which is why batches are grouped by length.",
    "evaluation": "Every rank needs its own products, so time grows with r_max; passes hold no more tokens than a "
    "batch (or 2,048), and what the ranks share is kept once, so memory does not.",
    "data": "Ordering an epoch sorts lengths, n log n: about half a second for as many examples as MNLI has.",
}


def grow(options: Options) -> dict[str, list[dict]]:
    """{quantity: points}; times in ms, memory in MB."""
    points = {
        "r_max": [
            step_point(MINILM, r, 16, 32, options) | {"x": r}
            for r in ((1, 8, 64) if options.quick else (1, 2, 4, 8, 16, 32, 64))
        ],
        "width": [
            step_point(Shape("", width, 6, width // 32), 8, 16, 32, options) | {"x": width}
            for width in (128, 256, 512, 1024)
        ],
        "length": [step_point(MINILM, 8, 16, length, options) | {"x": length} for length in (16, 64, 256, 512)],
        "evaluation": [evaluation_point(r, options.device) | {"x": r} for r in (1, 2, 4, 8, 16, 32, 64)],
        "data": [order_point(n) | {"x": n} for n in (1_000, 10_000, 100_000, 400_000)],
    }
    return points


def step_point(shape: Shape, r: int, rows: int, length: int, options: Options) -> dict:
    inputs = batch(rows, length, options.device)
    model, peer = peers.ours(shape, r, options.device), peers.peft(shape, r, options.device)
    times = alternate(
        {
            "ours": training_step(model, inputs, options.device, "fp32", drawn(model, r, rows, "example")),
            "peft": training_step(peer, inputs, options.device, "fp32"),
        },
        8 if length <= 64 else 4,
        options.device,
    )
    found = paired_ratio(times["ours"], times["peft"])
    return {
        "ours": 1000 * median(times["ours"]),
        "peft": 1000 * median(times["peft"]),
        "ratio": found.median,
        "low": found.low,
        "high": found.high,
        "saved_mb": saved_bytes(lambda: model(**inputs).loss, model.parameters()) / 1e6,
    }


def evaluation_point(r: int, device: str) -> dict:
    """In a process of its own, whose peak of memory is then this evaluation's."""
    found = subprocess.run([sys.executable, "-m", __name__, str(r), device], check=True, capture_output=True, text=True)
    ms, mb = map(float, found.stdout.split()[-2:])
    return {"ours": ms, "peak_mb": mb}


def evaluate_alone(r: int, device: str) -> tuple[float, float]:
    """Milliseconds of an evaluation at r ranks, and how many MB it took at most, beside the model."""
    model = peers.overlay(MINILM, r, device).eval()
    inputs = batch(32, 64, device)

    def evaluate():
        with torch.no_grad(), model.first_token_only():
            for _ in lora.at_ranks(model, inputs, range(1, r + 1), stack=True):
                pass

    before = memory("VmRSS", device)
    reset_peak(device)
    seconds = alternate({"ours": evaluate}, 1, device)["ours"]
    return 1000 * min(seconds), memory("VmHWM", device) - before


def reset_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    else:
        torch.cuda.reset_peak_memory_stats()


def memory(name: str, device: str) -> float:
    """MB in use ("VmRSS") or the peak since ``reset_peak`` ("VmHWM"): the process's, as Linux counts it, or the
    GPU's."""
    if device != "cpu":
        return (torch.cuda.max_memory_allocated() if name == "VmHWM" else torch.cuda.memory_allocated()) / 2**20
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) / 1024


def order_point(n: int) -> dict:
    lengths = (torch.randn(n, generator=torch.Generator().manual_seed(0)).abs() * 20 + 5).int().tolist()
    return {"ours": 1000 * min(alternate({"order": lambda: epoch_order(lengths, 32, 0, 0)}, 3)["order"])}


def plot_growth(points: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from loralib.report.plots import COLOURS, MARKERS

    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).flat
    drawings = [
        ("r_max", "training step, ms", [("ours", "DyLoRA, rank per example"), ("peft", "PEFT LoRA")], "r_max"),
        ("r_max", "saved for backward, MB", [("saved_mb", "DyLoRA")], "r_max"),
        ("width", "training step, ms", [("ours", "DyLoRA, rank per example"), ("peft", "PEFT LoRA")], "hidden width"),
        (
            "length",
            "training step, ms",
            [("ours", "DyLoRA, rank per example"), ("peft", "PEFT LoRA")],
            "tokens per example",
        ),
        ("evaluation", "all ranks of a batch: ms, peak MB", [("ours", "time, ms"), ("peak_mb", "memory, MB")], "r_max"),
        ("data", "ordering an epoch, ms", [("ours", "length-grouped order")], "training examples"),
    ]
    for panel, (name, label, lines, x) in zip(panels, drawings, strict=True):
        own = [p["x"] for p in points[name]]
        for (key, title), colour, marker in zip(lines, COLOURS, MARKERS, strict=False):
            values = [p[key] for p in points[name]]
            panel.plot(own, values, color=colour, marker=marker, markersize=5, label=title)
        panel.set(xlabel=x, ylabel=label, xscale="log")
        panel.set_xticks(own, [f"{value:,}" for value in own], minor=False)
        panel.set_xticks([], minor=True)
        if name == "r_max":
            panel.set_ylim(0, 1.25 * panel.dataLim.y1)
        else:
            panel.set_yscale("log")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            panel.legend(fontsize="small", frameon=False, loc="best")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    print(*evaluate_alone(int(sys.argv[1]), sys.argv[2]))
