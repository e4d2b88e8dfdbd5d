"""DyLoRA (arXiv 2210.07558): train one low-rank adapter, then use it at any rank from 1 to r_max.

import loralib as lora
"""

from .adapters.store import load_adapter, save_adapter
from .convolution import Conv1d, Conv2d, Conv3d
from .frozen import freeze_undrawn
from .gate import matryoshka_gate
from .layers import Embedding, Linear, LoRALayer, MergedLinear
from .model import (
    get_rank,
    inject,
    lora_state_dict,
    mark_only_lora_as_trainable,
    max_rank,
    merge,
    set_gate,
    set_matryoshka_gate,
    set_rank,
    use_rank,
)
from .ordering import order_components
from .sampling import RankSampler
from .version import __version__

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "RankSampler",
    "__version__",
    "freeze_undrawn",
    "get_rank",
    "inject",
    "load_adapter",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "matryoshka_gate",
    "max_rank",
    "merge",
    "order_components",
    "save_adapter",
    "set_gate",
    "set_matryoshka_gate",
    "set_rank",
    "use_rank",
]
