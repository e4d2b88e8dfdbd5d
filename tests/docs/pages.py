"""The documentation's pages, their blocks of code, and a directory in which these run."""

import csv
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = [
    *ROOT.glob("results/*/README.md"),
    *(ROOT / "results" / "study" / f"{name}.md" for name in ("tables", "choosing")),
    ROOT / "results" / "reliability.md",
]
WRITTEN = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("examples/*/README.md"),
    ROOT / "tests" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]  # fmt: skip
PAGES = WRITTEN + RESULTS


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, language: str) -> list[str]:
    """The blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The command lines of indented blocks, each whole."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = re.sub(r"\\\n\s+", "", text).splitlines()
    found, before = [], ""
    for line in lines:
        if (
            line.startswith("    ")
            and not line.startswith("     ")
            and (not before.strip() or before.startswith("    "))
        ):
            found.append(re.sub(r"\s+#\s.*", "", line.strip()))
        before = line
    return found


def write_data(directory: Path) -> None:
    """The files that the pages speak of, small; a pretrained encoder learns in a few steps what the labels are, a tiny one too."""
    kinds = "w3 w3 w3: a terrible, boring and hopeless", "w5 w5 w5: a wonderful, funny and moving"
    rows = [(f"w{i * 7 % 90} w{i * 3 % 80} {kinds[i % 2]} film, number {i}", i % 2) for i in range(160)]
    for file in ("train.csv", "validation.csv"):
        with open(directory / file, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([("text", "label"), *rows])
    pairs = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i * 3 % 90} w{i * 5 % 90}"} for i in range(16)]
    for file in ("train.jsonl", "validation.jsonl"):
        (directory / file).write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
