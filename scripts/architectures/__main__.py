"""Which architectures work, and with what: every check on a tiny model of each, as a page of the documentation.

python -m scripts.architectures                    # writes docs/reference/architectures.md, in a few minutes
python -m scripts.architectures --only BERT GPT-2  # prints these, writes nothing
"""

import argparse
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers

from loralib.files import write_text
from loralib.report.tables import markdown_table

from ..pages import page
from .checks import CHECKS, TARGETS, Case, Missing
from .models import ARCHITECTURES, Architecture

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
WORDS = {"usual": "usual", "all-linear": "all linear", "embeddings": "embeddings"}
YES, NONE = "yes", ""  # NONE: the question does not arise


def answer(check, case: Case) -> str:
    """ "yes", a sentence, or nothing where the architecture has no such thing."""
    try:
        check(case)
    except Missing:
        return NONE
    except Exception as error:  # whatever a person would get
        return " ".join(str(error).split()).split(". ")[0].rstrip(".") + "."
    return YES


def examine(architecture: Architecture) -> dict[str, dict[str, str]]:
    """{targets: {question: answer}}, without the choices of layers that the architecture does not have."""
    found: dict[str, dict[str, str]] = {}
    for targets in TARGETS:
        try:
            case = Case(architecture, targets)
        except Missing:
            continue
        except Exception as error:  # whatever a person would get
            found[targets] = dict.fromkeys(CHECKS, " ".join(str(error).split()))
            continue
        found[targets] = {name: answer(check, case) for name, check in CHECKS.items()}
    return found


def cell(answers: dict[str, str], notes: list[str]) -> str:
    """What stands in the table for one question: "yes" where every choice of layers gives it, else numbers of notes."""
    sentences = {}
    for targets, said in answers.items():
        if said not in (YES, NONE):
            sentences.setdefault(said, []).append(WORDS[targets])
    if not sentences:
        return YES if YES in answers.values() else "-"
    numbers = []
    for sentence, where in sentences.items():
        note = sentence if len(where) == len(answers) else f"{', '.join(where)}: {sentence}"
        if note not in notes:
            notes.append(note)
        numbers.append(f"[{notes.index(note) + 1}]")
    return ("yes, but " if YES in answers.values() else "") + " ".join(numbers)


def table(results: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """The page's lines below its head: the table and its notes."""
    notes: list[str] = []
    rows = []
    for name, run in results.items():
        cells = [cell({targets: answers[question] for targets, answers in run.items()}, notes) for question in CHECKS]
        rows.append([name, ", ".join(WORDS[targets] for targets in run), *cells])
    lines = [markdown_table(["architecture", "layers tried", *CHECKS], rows, "ll" + "l" * len(CHECKS))]
    return lines + ([""] + [f"{i}. {note}" for i, note in enumerate(notes, 1)] if notes else [])


HEAD = f"""# Architectures

Made by `python -m scripts.architectures` from what ran: tiny models with random weights, on a CPU, with torch
{torch.__version__.split("+")[0]}, transformers {transformers.__version__} and PEFT {peft.__version__}. "Usual" layers
are PEFT's choice for the architecture (`target_modules=None`), where it has one; "all linear" is `"all-linear"`;
"embeddings" the input embedding. A cell says "yes" if every choice of layers passes:

- **ranks**: rank 0 is the base model to rounding, and every rank from 1 to 4 is a model of its own;
- **a rank per example**: every example of a batch gets what it gets alone at its rank;
- **export to PEFT**: stock PEFT loads the adapter cut to 1 and whole, and computes the same;
- **merge**: `lora.merge(model, rank)` is plain and computes the same;
- **reload**: `save_adapter` and `load_adapter` into a fresh model;
- **order**: `order_components` leaves r_max as it was, and rank 1 of no layer is farther from it;
- **generate**: greedy tokens at one rank per sequence are the merged models' (- where it does not generate);
- **checkpointing**: gradients at one rank per example are the same with activation checkpointing (- where
  transformers has none)."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of architectures: print these alone")
    args = parser.parse_args(argv)
    names = [architecture.name for architecture in ARCHITECTURES]
    for name in args.only or []:
        if name not in names:
            parser.error(f"{name!r} is not among {', '.join(names)}.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = {}
    for architecture in ARCHITECTURES:
        if args.only is None or architecture.name in args.only:
            results[architecture.name] = examine(architecture)
            print(architecture.name, results[architecture.name], flush=True)
    lines = table(results)
    print("\n".join(lines))
    if args.only is None:
        write_text(PAGE, page([HEAD, "", *lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
