"""What a training is called by what a file tells of it."""

from .schedule import FACTS, RankSchedule


def title_of(facts: dict, r_max: int, fitted: bool = False) -> str:
    """The title of the training that ``facts`` (of an adapter's ``dylora.json``) tell, as far as they tell one;
    ``fitted``: whether strengths of each rank's own were learnt after it."""
    return _training(facts, r_max) + (", then strengths of each rank's own" if fitted else "")


def _training(facts: dict, r_max: int) -> str:
    known = {name: facts[name] for name in (*FACTS, "p", "reduce") if facts.get(name) is not None}
    if facts.get("gate_ranks"):
        known["gate_ranks"] = tuple(facts["gate_ranks"])
    if "sampling" not in known:
        return "an adapter"
    if before_ordering(facts):
        return "DyLoRA, before its components were ordered"
    if facts.get("cut_short"):
        return f"LoRA trained at rank {r_max}, cut short, its components ordered afterwards"
    try:
        return RankSchedule(**known).resolve(r_max, "several").title()
    except (TypeError, ValueError):
        return "an adapter"


def before_ordering(facts: dict) -> bool:
    """Whether ``dylora.json`` tells of a training that was stopped in its first part: its components have no order."""
    return facts.get("ordered") is False and bool(facts.get("full_rank_share")) and not facts.get("squeezed")
