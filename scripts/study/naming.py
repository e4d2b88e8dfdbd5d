"""What the study's tables call tasks and methods, and in which order."""

from loralib.report.choice import mean_and_error

from .methods import ALPHA, CUTS, METHODS, R_MAX, SHOWN, SWEEP
from .tried import TRIED, named

OF_SWEEP = {name: r for r, names in SWEEP.items() for name in names}
# Rows that several runs make together, one at each rank.
ROWS = {
    "sweep": "a LoRA for each rank (the sweep)",
    "plain-sweep": "a LoRA for each rank (the plain sweep)",
    "adalora": "an AdaLoRA for each rank",
    "squeeze": "LoRA-Squeeze to each rank",
}
HEAD = ["method", *(f"r={b}" for b in SHOWN)]
NAMES = {"cola": "CoLA (Matthews)", "rte": "RTE (accuracy)", "sst2": "SST-2, 10,000 examples (accuracy)",
         "mnli": "MNLI, 13,393 examples (accuracy)", "qnli": "QNLI, 8,999 examples (accuracy)",
         "qqp": "QQP, 8,999 examples (mean of accuracy and F1)"}  # fmt: skip


def title(method: str, r_max: int = R_MAX) -> str:
    return {**METHODS, **CUTS, **TRIED}[method].title.replace(f"r={R_MAX}", f"r={r_max}")


def with_error(values: list[float], digits: int = 1, sign: str = "") -> str:
    """Mean ± standard error, as tables write it; nothing where there are no values. ``sign``: "+" for differences."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def spans(seeds) -> str:
    """Seeds as tables write them: "0-2, 4"."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def order(methods) -> list[str]:
    wanted = [*ROWS, *CUTS, *METHODS, *TRIED]
    return sorted(methods, key=wanted.index)


def called(method: str) -> str:
    return ROWS.get(method) or title(method)


def strength_of(method: str, chosen: dict[int, str]) -> str:
    """The factor of the update, as tables write it: numbers, or a rule in the rank b. ``chosen``: the sweep's
    methods."""
    if method == "squeeze":
        return strength_of("squeeze-1", chosen)
    if method == "adalora":
        return "32/(its rank at the start)"
    if method in ("sweep", "plain-sweep"):
        names = chosen if method == "sweep" else {r: names[0] for r, names in SWEEP.items()}
        return ", ".join(f"{METHODS[names[r]].strength:g}" for r in sorted(names))
    if method == "cut-alpha/b":
        return f"{ALPHA}/b"
    trained = named(CUTS[method].of if method in CUTS else method)
    if trained.scaling == "alpha/r":
        return f"{trained.strength:g}"
    return trained.scaling.replace("alpha", f"{trained.alpha:g}")
