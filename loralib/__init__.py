"""DyLoRA (arXiv 2210.07558): train one low-rank adapter, then use it at any rank from 1 to r_max.

import loralib as lora
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .adapters.store import load_adapter, save_adapter
    from .all_ranks import at_ranks, share_between_ranks
    from .checkpointing import checkpoint_contexts
    from .convolution import Conv1d, Conv2d, Conv3d
    from .frozen import freeze_undrawn
    from .gate import matryoshka_gate
    from .importance import component_importance, order_by_importance
    from .layers import Embedding, Linear, LoRALayer, MergedLinear
    from .learning import declare_layout, learn_layout
    from .merged import merge
    from .model import (
        get_rank,
        inject,
        lora_state_dict,
        mark_only_lora_as_trainable,
        max_rank,
        set_gate,
        set_matryoshka_gate,
        set_rank,
        use_rank,
    )
    from .ordering import order_components
    from .pacing import pace_components
    from .sampling import RankSampler
    from .schedule import RankSchedule
    from .strengths import fit_strengths

# Where each name is found when it is first asked for (PEP 562): importing loralib, or running its command, loads no
# torch. A test holds this table to the imports above, which are for type checkers.
_MODULES = {
    "adapters.store": ("load_adapter", "save_adapter"),
    "all_ranks": ("at_ranks", "share_between_ranks"),
    "checkpointing": ("checkpoint_contexts",),
    "convolution": ("Conv1d", "Conv2d", "Conv3d"),
    "frozen": ("freeze_undrawn",),
    "gate": ("matryoshka_gate",),
    "importance": ("component_importance", "order_by_importance"),
    "layers": ("Embedding", "Linear", "LoRALayer", "MergedLinear"),
    "learning": ("declare_layout", "learn_layout"),
    "merged": ("merge",),
    "model": (
        *("get_rank", "inject", "lora_state_dict", "mark_only_lora_as_trainable", "max_rank"),
        *("set_gate", "set_matryoshka_gate", "set_rank", "use_rank"),
    ),
    "ordering": ("order_components",),
    "pacing": ("pace_components",),
    "sampling": ("RankSampler",),
    "schedule": ("RankSchedule",),
    "strengths": ("fit_strengths",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "RankSampler",
    "RankSchedule",
    "__version__",
    "at_ranks",
    "checkpoint_contexts",
    "component_importance",
    "declare_layout",
    "fit_strengths",
    "freeze_undrawn",
    "get_rank",
    "inject",
    "learn_layout",
    "load_adapter",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "matryoshka_gate",
    "max_rank",
    "merge",
    "order_by_importance",
    "order_components",
    "pace_components",
    "save_adapter",
    "set_gate",
    "set_matryoshka_gate",
    "set_rank",
    "share_between_ranks",
    "use_rank",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'loralib' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
