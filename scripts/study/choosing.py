"""The study's third page: how rates and the default were chosen, all on held-out parts of training data."""

from collections import Counter

from .cells import RATE_RUNS
from .held_out import lead_table, rate_table, tried_table, wide_rate_tables
from .language_tables import held_out_tables
from .methods import METHODS
from .naming import NAMES
from .shown import device_of


def choosing_page(records: list[dict], everything: list[dict]) -> list[str]:
    """``records``: those of the main tables; ``everything``: the language model's too."""
    tasks = " / ".join(f"{NAMES[task].split(' ')[0].rstrip(',')}'s seeds 0, 1" for task in ("cola", "sst2"))
    return [
        "# How rates and the default were chosen",
        "",
        "For [the study](README.md), on parts of training sets that were held out: a tenth, never trained on. "
        "±: one standard error.",
        "",
        "## Learning rates",
        "",
        f"AURAC on CoLA and SST-2, seeds 0 and 1 (`python -m scripts.study rates`). A cell holds {tasks}. Rates are a "
        'factor of two apart, and a grid goes on while its best mean is at an edge. "open": which rates are still to '
        "be measured; until then runs are at the rate that their table names. The mean of four runs decides, and one "
        "that collapsed (0.0) decides too: without it LoRA of rank 8 would take 0.002. What is chosen on these two "
        f"tasks counts for all. In the last column the best mean stands beside its rate. {searched_on(records)}",
        "",
        *rate_table(records),
        *wide_rate_tables(everything),
        *lead_table(records),
        *held_out_tables(everything),
        *tried_table(records),
    ]


def searched_on(records: list[dict]) -> str:
    """A sentence: which devices the searches for rates ran on."""
    kept = [r for r in records if r["split"] == "held_out" and (r["task"], r["seed"]) in RATE_RUNS]
    on = Counter(device_of(r) for r in kept if r["method"] in METHODS)
    return f"Of these runs {', '.join(f'{n} are on {name}' for name, n in sorted(on.items()))}." if on else ""
