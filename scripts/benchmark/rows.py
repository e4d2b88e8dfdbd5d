"""What a case yields: rows of ours against one peer."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .peers import MINILM, ROBERTA_BASE, Shape
from .timing import paired_ratio


@dataclass(frozen=True)
class Row:
    """ours / peer of one quantity; below 1 is better. ``limit``: what the project promises of the ratio, if anything.

    ``of_machine``: the processor decides the ratio, as where one precision stands beside another, so what another
    machine recorded says nothing of ours and ``--check`` holds it to its limit alone.
    """

    case: str
    setting: str
    ours: str
    peer: str
    unit: str
    ours_value: float
    peer_value: float
    ratio: float
    low: float
    high: float
    limit: float | None = None
    note: str = ""
    of_machine: bool = False


@dataclass
class Options:
    device: str = "cpu"
    quick: bool = False
    data: str | None = None  # GLUE tasks on disk, as run_glue's --dataset_dir

    @property
    def dtypes(self) -> list[str]:
        return ["fp32", "bf16"] if self.device == "cpu" else ["fp32", "bf16", "fp16"]

    def shapes(self) -> list[Shape]:
        return [MINILM, ROBERTA_BASE.cut(2)] if self.quick else [MINILM, ROBERTA_BASE]


def timed(
    case: str,
    setting: str,
    times: dict[str, list[float]],
    ours: str,
    limits: dict[str, float] | None = None,
    per_peer_note: dict[str, str] | None = None,
) -> Iterator[Row]:
    """Rows of ``ours`` against every other contender of ``times``, in milliseconds."""
    for peer, seconds in times.items():
        if peer == ours or peer.startswith("DyLoRA"):
            continue
        found = paired_ratio(times[ours], seconds)
        yield Row(
            case, setting, ours, peer, "ms", 1000 * median(times[ours]), 1000 * median(seconds),
            found.median, found.low, found.high, (limits or {}).get(peer), (per_peer_note or {}).get(peer, ""),
        )  # fmt: skip


def exact(case, setting, ours, peer, unit, ours_value, peer_value, limit=None, note="") -> Row:
    """A row of something that is counted and not timed."""
    ratio = ours_value / peer_value
    return Row(case, setting, ours, peer, unit, ours_value, peer_value, ratio, ratio, ratio, limit, note)


def median(values: list[float]) -> float:
    return float(np.median(values))
