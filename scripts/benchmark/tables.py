"""What the benchmark leaves: a JSON file for each device, README.md with their tables, and the check against them."""

import importlib.metadata
import json
import platform
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from loralib.files import write_text
from loralib.report.tables import markdown_table

from ..pages import page
from .growth import WHY
from .rows import Options, Row

PACKAGES = ("torch", "transformers", "peft", "lycoris-lora", "accelerate", "datasets")
MISSING = "not installed"
SLACK = 1.05  # a ratio this much above the recorded interval is a regression, and none below it


def key(row: dict) -> tuple:
    return row["case"], row["setting"], row["ours"], row["peer"]


def line(row: Row) -> str:
    interval = "" if row.low == row.high else f" [{row.low:.3f}, {row.high:.3f}]"
    return (
        f"{row.case}: {row.setting}: {row.ours} {row.ours_value:.4g} {row.unit}, {row.peer} {row.peer_value:.4g}; "
        f"ratio {row.ratio:.3f}{interval} {row.note}"
    )


def machine(device: str) -> dict:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        name = next((x.split(":")[1].strip() for x in cpu.read_text().splitlines() if x.startswith("model name")), name)
    if device != "cpu":
        name = f"{torch.accelerator.current_accelerator()}: {torch.cuda.get_device_name()}"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = MISSING
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def record(file: Path, rows: list[Row], growth: dict | None, options: Options, argv: list[str]) -> None:
    """Write the device's JSON file; what was not measured this time keeps its rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = read(file) if file.exists() else {"commands": [], "rows": [], "growth": None}
    fresh = [asdict(row) for row in rows]
    seen = {row["case"] for row in fresh}
    now = machine(options.device)
    earlier = before.get("machine", {}).get("versions", {})  # of a peer that is not here this time
    now["versions"] = {name: earlier.get(name, v) if v == MISSING else v for name, v in now["versions"].items()}
    found = {
        "commands": list(
            dict.fromkeys([*before["commands"], shlex.join(["python", "-m", "scripts.benchmark", *argv])])
        ),
        "machine": now,
        "rows": [row for row in before["rows"] if row["case"] not in seen] + fresh,
        "growth": growth or before["growth"],
    }
    write_text(file, json.dumps(found, indent=1) + "\n")


def regressions(rows: list[Row], recorded: list[dict]) -> list[str]:
    """One sentence for each ratio whose whole interval lies above what was promised or recorded."""
    known = {key(row): row for row in recorded}
    found = []
    for row in rows:
        before = known.get(key(asdict(row)))
        if row.limit is not None and row.low > row.limit:
            found.append(f"{line(row)}: above the promised {row.limit:.3f}")
        elif before is not None and not row.of_machine and row.low > SLACK * before["high"]:
            found.append(f"{line(row)}: it was {before['ratio']:.3f} [{before['low']:.3f}, {before['high']:.3f}]")
    return found


# --- README.md ------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[dict]) -> list[str]:
    """Markdown rows; ``limit`` is shown with whether the figure keeps it."""
    cells = []
    for row in rows:
        interval = "" if row["low"] == row["high"] else f" ({row['low']:.3f} to {row['high']:.3f})"
        promised = (
            "" if row["limit"] is None else f"{row['limit']:.3f}: {'kept' if row['high'] <= row['limit'] else 'missed'}"
        )
        peer = row["peer"] + (f"; {row['note']}" if row["note"] else "")
        ours, theirs = (f"{number(row[name])} {row['unit']}" for name in ("ours_value", "peer_value"))
        cells.append([row["setting"], row["ours"], peer, ours, theirs, f"{row['ratio']:.3f}{interval}", promised])
    return [markdown_table(["setting", "ours", "peer", "ours", "peer", "ratio (95 %)", "promised"], cells, "lllrrrl")]


def write_readme(directory: Path) -> None:
    """README.md from every JSON file that is there."""
    lines = [
        "# Speed, beside every peer",
        "",
        "Made by `python -m scripts.benchmark`. Contenders take turns in one process; a ratio is ours / peer, the "
        "median over rounds, below 1 where ours is faster or smaller, with a 95 percent interval (bootstrap over "
        'rounds); counted quantities have none. "promised" is the largest ratio that the project sets itself, and '
        "whether it was kept. The peers run at rank 8; the frozen encoder is the floor, since it has no backward pass "
        "through the encoder.",
    ]
    for file in sorted(directory.glob("*.json")):
        found = read(file)
        own = found["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        lines += ["", f"## {file.stem}", "", *(f"    {command}" for command in found["commands"]), ""]
        lines += [f"{own['device']}, {own['threads']} threads, Python {own['python']}; {versions}."]
        for case in dict.fromkeys(row["case"] for row in found["rows"]):
            lines += [
                "",
                f"### {case[0].upper()}{case[1:]}",
                "",
                *table([row for row in found["rows"] if row["case"] == case]),
            ]
        if found.get("growth"):
            lines += ["", "### Growth", "", f"![growth]({file.stem}-growth.png)", ""]
            lines += [f"- **{name}**: {sentence}" for name, sentence in WHY.items()]
            flat = found["growth"]["r_max"]
            lines += [
                "",
                "The step beside PEFT's by r_max: " + ", ".join(f"{p['x']}: {p['ratio']:.3f}" for p in flat) + ".",
            ]
            memory = found["growth"]["evaluation"]
            lines += [
                "",
                "Peak memory of an all-rank evaluation by r_max, MB: "
                + ", ".join(f"{p['x']}: {p['peak_mb']:.0f}" for p in memory)
                + ".",
            ]
    if not (directory / "cuda.json").exists():
        lines += ["", "All of this was measured on processors; `--device cuda` has no table yet."]
    write_text(directory / "README.md", page(lines) + "\n")
