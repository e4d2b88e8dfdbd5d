"""Where the study's runs ran, and what else a reader may ask of them."""

from collections import Counter

import numpy as np

from .cells import usual_records
from .methods import CUTS, DEFAULT, METHODS, R_MAX
from .shown import AVERAGED, PROCESSOR, device_of

PAPER = (
    "The paper reports, for RoBERTa-base on eight GLUE tasks, an average of 84.22 at rank 1 and 85.44 at rank 8 "
    "for one DyLoRA, against 54.90 and 85.27 for a LoRA trained at rank 8 and cut; and 83.30 / 84.47 (rank 1 / 8) for "
    "uniform non-frozen sampling against 81.61 / 83.31 for frozen (arXiv 2210.07558). Encoder, data and budget differ "
    "from ours: only the order of methods can be compared, and the distance from frozen to non-frozen is larger here."
)


def the_runs(records: list[dict]) -> list[str]:
    """A section of all runs; what the default shares is told of those of the main tables."""
    usual = usual_records(records)
    told = [sentence for sentence in (where(records), shared(usual), between(usual), PAPER) if sentence]
    return ["## The runs", "", *(f"- {sentence}" for sentence in told), ""]


def where(records: list[dict]) -> str:
    """How many trainings ran on what."""
    trained = [r for r in records if r["method"] not in CUTS]
    counts = Counter(map(device_of, trained))
    on = [f"{counts[name]} on one {name} (fp32, products in TF32)" for name in sorted(counts) if name != PROCESSOR]
    on += [f"{counts[PROCESSOR]} on a core each of a processor (fp32, or bf16 autocast where it has bf16 products)"]
    unnamed = sum("precision" not in r for r in trained)
    return (
        f"Of the trainings, {' and '.join(on)}; {unnamed} lines of runs.jsonl, of processors, do not say in which "
        f"precision. They are of {len({r.get('commit') for r in trained})} commits, which the lines tell."
    )


def shared(records: list[dict]) -> str:
    """How many of the default's runs went on from a LoRA's, device by device; nothing if none did."""
    own = [r for r in records if r["method"] == DEFAULT and r["split"] == "validation"]
    on, went_on = (Counter(map(device_of, runs)) for runs in (own, [r for r in own if "from" in r]))
    told = ", ".join(f"{went_on[name]} of {on[name]} on {name}" for name in sorted(on))
    return (
        "A run of the default goes on from the LoRA of rank 8 with the same seed where its checkpoint was kept, and "
        f"so shares {METHODS[DEFAULT].schedule.full_rank_share:g} of the training with it: {told}."
    ) * bool(sum(went_on.values()))


def between(records: list[dict]) -> str:
    """The default at all ranks, of the runs that measured them all."""
    ranks = [str(b) for b in range(1, R_MAX + 1)]
    own = [r for r in records if r["method"] == DEFAULT and r["split"] == "validation" and r["task"] in AVERAGED]
    own = [r["scores"] for r in own if set(ranks) <= set(r["scores"])]
    means = ", ".join(f"{np.mean([run[b] for run in own]):.1f}" for b in ranks) if own else ""
    return (
        f"Ranks between those of the tables: {len(own)} runs of the default on validation were measured at all of 1 "
        f"to {R_MAX}, in the mean {means} (not all tasks and seeds, so not to be held against the tables)."
    ) * bool(own)
