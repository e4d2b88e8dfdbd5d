"""How each layer's factors stand in PEFT's LoRA format, and back.

PEFT computes ``(lora_alpha / R) * B' A'`` (``lora_alpha / sqrt(R)`` with ``use_rslora``). For most layers A' and B' are
the factors themselves and R is the rank; a MergedLinear becomes one block-diagonal update of rank projections * b, a
convolution one of rank b * (product of the kernel sizes).
"""

import math
import re
from collections import Counter

import torch

from ..convolution import Convolution
from ..gate import scale
from ..layers import Embedding, LoRALayer, MergedLinear
from ..parts import part
from ..sharding import whole

PREFIX = "base_model.model."
# Fields of PEFT's configuration under which an adapter is a plain low-rank update of the stored base: those that are
# read here, and those that say nothing of the numbers. Any other field must be off.
PLAIN = {
    *(
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
    ),
    *(
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
    ),
    *(
        "fan_in_fan_out",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "ensure_weight_tying",
    ),
    *("runtime_config", "eva_config", "qalora_group_size"),
}
PLAIN_STARTS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    None,
)  # others (PiSSA, OLoRA, CorDA, LoftQ) change the base too


def refuse_what_is_no_plain_lora(config: dict, path) -> None:
    """Raise ValueError, with the field's name, for a PEFT adapter whose numbers are no plain low-rank update of its
    base."""
    checked = {"bias": config.get("bias", "none") != "none", "init_lora_weights": False}
    checked["init_lora_weights"] = config.get("init_lora_weights", True) not in PLAIN_STARTS
    others = {name: bool(value) for name, value in config.items() if name not in PLAIN and name not in checked}
    for name, is_on in (checked | others).items():
        if is_on:
            raise ValueError(
                f"{path} was made with {name} = {config[name]!r}, so its numbers are no plain low-rank update of the "
                "base model; loralib cannot load it."
            )


def expansion(layer: LoRALayer) -> int:
    """R / b: how many of PEFT's components one of the layer's is."""
    return math.prod(layer.kernel_size) if isinstance(layer, Convolution) else layer.projections


def clean(name: str) -> str:
    """The name of a module or parameter without what torch.compile and torch's checkpoint_wrapper put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def keys(layer: LoRALayer, name: str) -> tuple[str, str]:
    """The names of A' and B' in a file."""
    name = clean(name)
    kind = "lora_embedding_{}" if isinstance(layer, Embedding) else "lora_{}.weight"
    return f"{PREFIX}{name}.{kind.format('A')}", f"{PREFIX}{name}.{kind.format('B')}"


def to_peft(layer: LoRALayer, name: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A' and B' from the layer's own factors, whole or cut. Raises ValueError where PEFT's format has no place for
    them."""
    if isinstance(layer, MergedLinear):
        blocks = torch.block_diag(*B.chunk(layer.projections))
        parts = iter(blocks.chunk(layer.projections))
        empty = torch.zeros_like(blocks[: len(blocks) // layer.projections])
        B = torch.cat([next(parts) if enabled else empty for enabled in layer.enable_lora])
    elif isinstance(layer, Convolution):
        if layer.groups != 1:
            raise ValueError(
                f"layer {name!r} is a convolution with groups = {layer.groups}, which PEFT's format has no place for."
            )
        # Row m of A fills one of the equal blocks of the flattened kernel: component (m, p) is row m in block p.
        blocks = math.prod(layer.kernel_size) // layer.rows
        A = torch.einsum("mi,pq->mpqi", A, torch.eye(blocks, dtype=A.dtype, device=A.device))
        A = A.reshape(-1, layer.in_channels, *layer.kernel_size)
        B = B.view(layer.out_channels, blocks, -1).transpose(1, 2).reshape(layer.out_channels, -1)
        B = B.reshape(*B.shape, *[1] * len(layer.kernel_size))
    return A, B


def from_peft(layer: LoRALayer, name: str, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's own factors (at the file's rank) from A' and B'. Raises ValueError if they cannot be expressed."""
    if isinstance(layer, MergedLinear):
        chunks = zip(B.chunk(len(layer.enable_lora)), layer.enable_lora, strict=True)
        parts = [part for part, enabled in chunks if enabled]
        b = B.shape[1] // layer.projections
        factors = A, torch.cat([part[:, g * b : (g + 1) * b] for g, part in enumerate(parts)])
    elif isinstance(layer, Convolution):
        blocks = math.prod(layer.kernel_size) // layer.rows
        factors = (
            A.reshape(-1, blocks, blocks, layer.in_channels * layer.rows)[:, 0, 0],
            B.reshape(layer.out_channels, -1, blocks).transpose(1, 2).reshape(layer.out_channels * blocks, -1),
        )
    else:
        return A, B
    if not all(torch.equal(x, y) for x, y in zip(to_peft(layer, name, *factors), (A, B), strict=True)):
        raise ValueError(
            f"the entry for {name!r} is no loralib {type(layer).__name__} adapter; it cannot be loaded into one."
        )
    return factors


def entries(layers: list[tuple[str, LoRALayer]], rank: int) -> tuple[dict[str, torch.Tensor], dict]:
    """The file's tensors at ``rank`` and the part of its configuration that gives each layer rank and strength."""
    rslora = all(layer.scaling == "alpha/sqrt(b)" for _, layer in layers)
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for name, layer in layers:
        b = part(layer, rank)
        if not b:
            continue  # importance leaves it no component at this rank
        A, B = layer.cut(whole(layer.lora_A.detach()), whole(layer.lora_B.detach()), b)
        factors = A, B if layer.strength_at is None else B * layer.strength_at[b - 1]
        tensors.update(zip(keys(layer, name), to_peft(layer, name, *factors), strict=True))
        R = b * expansion(layer)
        strength = scale(b, layer.r, layer.lora_alpha, layer.scaling)
        sizes[name] = R, tidy(strength * math.sqrt(R) if rslora else strength * R)
    return tensors, patterns(sizes) | {
        "use_rslora": rslora,
        "fan_in_fan_out": all(getattr(layer, "fan_in_fan_out", False) for _, layer in layers),
    }


def patterns(sizes: dict[str, tuple[int, float]]) -> dict:
    """PEFT's words for {layer's name: (R, alpha)}: the most common pair, and what differs from it.

    A pattern is a regular expression for the ending of a name. Where a layer's name would fit another layer too, its
    pattern is for the whole name.
    """
    (r, alpha), _ = Counter(sizes.values()).most_common(1)[0]

    def pattern(name: str) -> str:
        fits = [other for other in sizes if re.match(rf"(.*\.)?({name})$", other)]
        return name if fits == [name] else f"^{re.escape(name)}"

    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern(name): R for name, (R, _) in sizes.items() if r != R},
        "alpha_pattern": {pattern(name): a for name, (_, a) in sizes.items() if a != alpha},
    }


def tidy(alpha: float) -> float | int:
    """16.000000000000004, which a product of roots may give, is 16."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
