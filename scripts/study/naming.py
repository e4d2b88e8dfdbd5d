"""What the study's tables call tasks and methods, and in which order."""

from loralib.report.choice import mean_and_error

from .methods import ALPHA, CUTS, METHODS, R_MAX, SHOWN, SWEEP
from .tried import TRIED, named

OF_SWEEP = {name: r for r, names in SWEEP.items() for name in names}
# Rows that several runs make together, one at each rank.
ROWS = {
    "sweep": "LoRA trained at that rank alone (the sweep)",
    "adalora": "AdaLoRA trained for that rank alone",
    "squeeze": "LoRA of rank 8 for 0.8 of the steps, SVD, then that rank alone (LoRA-Squeeze)",
}
HEAD = ["method", *(f"r={b}" for b in SHOWN)]
NAMES = {"cola": "CoLA (Matthews)", "rte": "RTE (accuracy)", "sst2": "SST-2, 10,000 examples (accuracy)",
         "mnli": "MNLI, 13,393 examples (accuracy)", "qnli": "QNLI, 8,999 examples (accuracy)",
         "qqp": "QQP, 8,999 examples (mean of accuracy and F1)"}  # fmt: skip


def title(method: str, r_max: int = R_MAX) -> str:
    return {**METHODS, **CUTS, **TRIED}[method].title.replace(f"rank {R_MAX}", f"rank {r_max}")


def with_error(values: list[float], digits: int = 1, sign: str = "") -> str:
    """Mean ± standard error, as tables write it; nothing where there are no values. ``sign``: "+" for differences."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


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
    if method == "sweep":
        return ", ".join(f"{METHODS[name].strength:g}" for _, name in sorted(chosen.items()))
    if method == "cut-alpha/b":
        return f"{ALPHA}/b"
    trained = named(CUTS[method].of if method in CUTS else method)
    if trained.scaling == "alpha/r":
        return f"{trained.strength:g}"
    return trained.scaling.replace("alpha", f"{trained.alpha:g}")
