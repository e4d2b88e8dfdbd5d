"""What strengths of each rank's own add to the very weights that they were fitted to."""

from loralib.report.tables import markdown_table
from loralib.strengths import UPDATES

from .averages import RANKS, interval
from .cells import LANGUAGE, LEAD_RUNS
from .methods import CUTS, DEFAULT, SHOWN
from .naming import NAMES, title, with_error
from .shown import AVERAGED

FITTED = {name: "cut-svd" if made.of == "lora-8" else made.of for name, made in CUTS.items() if made.by == "strengths"}
Gains = dict[tuple[str, int], dict[int, float]]  # {(task, seed): {rank: what was added}}


def gains(records: list[dict], method: str, split: str) -> Gains:
    """After minus before, of the first line of each task and seed."""
    found: Gains = {}
    for r in records:
        if r["method"] == method and r["split"] == split and "before" in r:
            added = {b: r["scores"][str(b)] - r["before"][str(b)] for b in SHOWN}
            found.setdefault((r["task"], r["seed"]), added)
    return found


def by_seed(found: Gains, ranks, tasks: tuple[str, ...] = AVERAGED) -> list[float]:
    """The mean over tasks and ranks of each seed that all the tasks have."""
    seeds = set.intersection(*({seed for task, seed in found if task == each} for each in tasks))
    return [
        sum(found[task, seed][b] for task in tasks for b in ranks) / len(tasks) / len(ranks) for seed in sorted(seeds)
    ]


def fitted_tables(records: list[dict], everything: list[dict]) -> list[str]:
    """``records``: those of the main tables; ``everything``: the language model's too."""
    rows = []
    for method, of in FITTED.items():
        found, sizes = gains(records, method, "validation"), RANKS.values()
        if len(by_seed(found, SHOWN)) >= 2:
            for name, tasks in (("validation", AVERAGED), ("validation, without CoLA", AVERAGED[1:])):
                values = [by_seed(found, ranks, tasks) for ranks in sizes]
                rows.append(
                    [title(of), name, *(interval(each, 2) for each in values), f"{len(values[0])} seeds, 95 percent"]
                )
        held = [curve for run, curve in gains(records, method, "held_out").items() if run in LEAD_RUNS]
        if len(held) >= 2:
            values = [[sum(curve[b] for b in ranks) / len(ranks) for curve in held] for ranks in sizes]
            cells = [with_error(each, 2, "+") for each in values]
            rows.append([title(of), "held out", *cells, f"{len(held)} runs, one standard error"])
    if not rows:
        return []
    named = ", ".join(NAMES[task].split(",")[0].split(" ")[0] for task in dict.fromkeys(task for task, _ in LEAD_RUNS))
    return [
        "## Strengths of each rank's own",
        "",
        "Once a training is over, each layer can learn how strong its update should be at each rank "
        f"(`--fit_strengths`, `lora.fit_strengths`): {UPDATES} updates more{share(records)}. Here is what that "
        "adds to the same weights, in points, so that machines and precisions cancel out; held out: parts of "
        f"the training sets of {named}, on which it was found. It is no part of the default, whose aim is what one "
        "training's steps can give, and of no peer.",
        "",
        markdown_table(["added to", "on", *RANKS, "±"], rows, "l"),
        "",
        *language_table(everything),
    ]


def in_short(records: list[dict]) -> list[str]:
    """The figures in a sentence for the top of the page, on validation."""
    told = {}
    for name in ("cut-strengths", f"{DEFAULT}-strengths"):
        found = gains(records, name, "validation")
        if len(by_seed(found, SHOWN)) < 2:
            return []
        told[name] = f"{interval(by_seed(found, SHOWN))} ({interval(by_seed(found, (1,)))} at rank 1)"
    of_svd, of_default = told.values()
    return [
        "- **Strengths of each rank's own**, learnt in a few updates once a training is over, add to the reduced LoRA "
        f"{of_svd} in the mean of the ranks, to the default {of_default}; they lower the language model's losses too "
        "([figures](#strengths-of-each-ranks-own)).",
    ]


def share(records: list[dict]) -> str:
    """Which part of a training's updates that is, over the tasks, where it is known."""
    plain = [r for r in records if r["split"] == "validation" and r["method"] == "lora-8" and r["task"] in AVERAGED]
    steps = [r["steps"] for r in plain]
    low, high = (round(100 * UPDATES / most(steps, default=UPDATES)) for most in (max, min))
    return f", {low} to {high} percent of a training's" if steps else ""


def language_table(records: list[dict]) -> list[str]:
    """The same of the language model's loss."""
    rows, steps = [], 1
    for method, of in FITTED.items():
        steps = max([steps, *(r.get("steps", 0) for r in records if r["method"] == method and r["task"] in LANGUAGE)])
        for split in ("validation", "held_out"):
            found = [curve for (task, _), curve in sorted(gains(records, method, split).items()) if task in LANGUAGE]
            if found:
                cells = [with_error([curve[b] for curve in found], 4, "+") for b in SHOWN]
                rows.append([title(of), split.replace("_", " "), *cells, str(len(found))])
    if not rows:
        return []
    return [
        f"On the language model, in nats of the loss (less is better; ± one standard error); there {UPDATES} updates "
        f"are {round(100 * UPDATES / steps)} percent of a training's:",
        "",
        markdown_table(["added to", "on", *(f"rank {b}" for b in SHOWN), "seeds"], rows, "l"),
        "",
    ]
