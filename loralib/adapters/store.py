"""Adapters of a model, saved in PEFT's LoRA format, cut to any rank, and loaded; .bin files of microsoft/LoRA and of
the released DyLoRA code are loaded too.

What the files hold is in ``loralib.adapters.directory``.
"""

import math
import os
import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import check_int
from ..copying import deep_copy
from ..gate import scale
from ..heads import default_head, is_inside, modules_to_save
from ..inside_peft import refuse_add_adapter, refuse_heads_of_add_adapter
from ..layers import Embedding, LoRALayer
from ..model import has_lora, inject, lora_layers, refuse_trained_biases
from ..parts import part
from ..sharding import at_rest, by_one_process, put, whole
from ..walking import unwrapped
from . import labels, peft_format
from .base import base_plan, base_sample, check_base, warn_of_new_tokens
from .directory import AdapterFiles, cut, read_bin, read_directory, write_adapter
from .hub import local
from .keys import factor_in, is_of_base
from .kinds import label_facts, task_type
from .of_peft import is_peft_model, load_peft_adapter, save_peft_adapter
from .refusing import refuse_failed_training
from .spreading import spread_facts, take_spread
from .strength import check_strength


def save_adapter(model: nn.Module, path: str | os.PathLike, rank: int | None = None, extra: dict | None = None) -> None:
    """Write the adapter of ``model``, cut to ``rank`` (default: r_max), and its modules to save into directory
    ``path``.

    The strength of rank ``rank`` is exact under stock PEFT: alpha/b and alpha/r as ``lora_alpha``, alpha/sqrt(b) as
    ``use_rslora``. ``extra`` goes into ``dylora.json``. Raises ValueError for a rank outside 1..r_max, and if biases
    were set to train (``mark_only_lora_as_trainable(model, bias=...)``), which the format has no place for. The files
    are written beside their places and renamed together: a process killed while saving leaves a whole adapter. For a
    model under FSDP2 all processes call this together, and the first one writes the whole adapter.
    """
    if not str(path):
        raise ValueError("path is empty; give the directory that the adapter is written to.")
    model = unwrapped(model)
    sharded = at_rest(model)
    extra = getattr(model, "lora_trained", {}) | (extra or {})  # what a loop of one's own, or an ordering, left there
    layers = [(peft_format.clean(name), layer) for name, layer in lora_layers(model)]
    r_max = max(layer.r for _, layer in layers)
    rank = r_max if rank is None else rank
    check_int("rank", rank, 1, r_max, f"an adapter is saved at a rank from 1 to {r_max}.")
    for name, layer in layers:
        if not layer.lora_A.numel() or not layer.lora_B.numel():
            raise ValueError(
                f"layer {name!r} has factors without numbers, as DeepSpeed's ZeRO stage 3 leaves them; gather them "
                "first (deepspeed.zero.GatheredParameters)."
            )
    if is_peft_model(model):
        return save_peft_adapter(model, layers, path, rank, extra)
    refuse_trained_biases(model)
    tensors, config = peft_format.entries(layers, rank)
    layers = [(name, layer) for name, layer in layers if part(layer, rank)]
    heads = modules_to_save(model)
    refuse_heads_of_add_adapter(model)
    warn_of_new_tokens(model, heads)
    state = {peft_format.clean(key): value for key, value in model.state_dict().items()}
    tensors |= {peft_format.PREFIX + key: value for key, value in state.items() if is_inside(key, heads)}
    tensors = {key: whole(value.detach()).cpu().contiguous().clone() for key, value in tensors.items()}
    refuse_failed_training(tensors)
    _, first = layers[0]
    config |= {
        "peft_type": "LORA",
        # Stock PEFT looks for the head of a classifier's task in the file.
        "task_type": task_type(model) if heads or not default_head(model) else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "target_modules": _target_names(model, layers),
        "modules_to_save": heads or ([] if default_head(model) else None),
        "lora_dropout": _dropout(layers),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    facts: dict[str, Any] = {
        "rank": rank,
        "r_max": r_max,
        "lora_alpha": peft_format.tidy(first.lora_alpha),
        "scaling": first.scaling,
    }
    others = {name: layer.scaling for name, layer in layers if layer.scaling != first.scaling}
    facts |= {"scalings": others} if others else {}
    merged = {name: layer.projections for name, layer in layers if layer.projections > 1}
    facts |= base_sample(layers) | ({"projections": merged} if merged else {}) | spread_facts(layers, rank)
    facts |= label_facts(model) | (extra or {})
    by_one_process(sharded, lambda: write_adapter(path, tensors, config, facts))


def _dropout(layers: list[tuple[str, LoRALayer]]) -> float:
    """That of the layers; an embedding has none, whatever the others have. Warns of several, of which a file holds
    one."""
    found = [getattr(layer.lora_dropout, "p", 0.0) for _, layer in layers if not isinstance(layer, Embedding)]
    if len(set(found)) > 1:
        warnings.warn(
            f"The layers have several dropouts ({', '.join(f'{p:g}' for p in sorted(set(found)))}), and an adapter's "
            f"files hold one: a training that goes on from them has {found[0]:g} everywhere.",
            stacklevel=3,
        )
    return float(found[0]) if found else 0.0


def _target_names(model: nn.Module, layers: list[tuple[str, LoRALayer]]) -> list[str] | str:
    """The shortest list of names that PEFT matches with the adapted layers and no others, or, where an adapted layer's
    name is the ending of another module's, a regular expression for the whole names."""
    adapted = {name for name, _ in layers}
    endings = {name.rpartition(".")[2] for name in adapted}
    every = {peft_format.clean(name) for name, _ in model.named_modules()}
    others = {name.rpartition(".")[2] for name in every if name and name not in adapted}
    if not endings & others:
        return sorted(endings)
    also = any(name.endswith(f".{one}") for one in adapted for name in every - adapted)
    return "|".join(map(re.escape, sorted(adapted))) if also else sorted(adapted)


def load_adapter(
    model: nn.Module, path: str | os.PathLike, rank: int | None = None, head: str = "require"
) -> list[str]:
    """Load an adapter, cut to ``rank`` if given, into ``model``; return the modules to save that keep their own
    weights.

    ``path`` is a directory in PEFT's format (ours or PEFT's own; its rank becomes r_max), the name of such a repository
    on the hub ("owner/name"), or a ``.bin`` state dict of microsoft/LoRA or the released DyLoRA code. A model without
    loralib layers gets them from the directory's configuration; a ``.bin`` needs a model that has them.

    ``head``: "require" raises if an entry of a module to save is missing or has another shape, and if the file's label
    names are not those of the model's configuration; "fresh" leaves a module of another shape as it is and takes other
    labels for a start. The same names in another order are put in the model's order.

    Raises FileNotFoundError or ValueError before anything of the model is changed.
    """
    if head not in ("require", "fresh"):
        raise ValueError(f"head is {head!r}; choose 'require' or 'fresh'.")
    path = local(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give an adapter's directory or a .bin file.")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is one file of an adapter; give its directory, {path.parent}.")
    if rank is not None:
        check_int("rank", rank, 1, math.inf, "an adapter is loaded at a rank of 1 or more.")
    model = unwrapped(model)
    if has_lora(model):
        refuse_add_adapter(model, lora_layers(model), "loaded into")
        for _, layer in lora_layers(model):
            layer.check_unmerged()
        if is_peft_model(model):
            if rank is not None:
                raise ValueError("A model of PEFT's keeps its rank; cut the adapter with dylora export, and load that.")
            load_peft_adapter(model, lora_layers(model), path)
            return []
    files = read_directory(path) if path.is_dir() else None
    if files is not None and rank is not None:
        files.refuse_unordered(rank)
        if {"components_at", "spread", "strength_at"} & files.facts.keys():
            files, rank = cut(files, min(rank, files.rank)), None  # each layer has a rank of its own
    tensors = files.tensors if files else read_bin(path)
    to_inject = []
    model = getattr(model, "_orig_mod", model)
    at_rest(model)
    skeleton = model
    if not has_lora(model):
        if files is None:
            raise ValueError(
                f"{type(model).__name__} has no loralib layer to load {path} into; call loralib.inject first."
            )
        to_inject = _layers_of(model, files)
        weights = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()}
        skeleton = deep_copy(model, weights)
        for options in to_inject:
            inject(skeleton, **_cut(options, rank))

    plan = base_plan(skeleton.state_dict(), tensors, path)
    plan |= _adapter_plan(skeleton, tensors, files is not None, path, rank)
    head_plan, fresh = _head_plan(skeleton, tensors, path, head)
    if files is not None:
        _labels_in_order(skeleton, files, head_plan, head)
        heads = modules_to_save(skeleton)
        for key in (key.removeprefix(peft_format.PREFIX) for key in tensors if not factor_in(key)):
            if not is_inside(key, heads) and not is_of_base(key):
                raise ValueError(
                    f"{path} holds {key!r}, trained beside the adapter, and the model does not take it; name its "
                    "module in modules_to_save (biases cannot be loaded)."
                )
        layers = lora_layers(skeleton)
        if not to_inject:
            check_strength(layers, files)
        sampled = files.facts.get("base_sample_of", layers[-1][0])
        if f"{sampled}.weight" not in plan:
            check_base(dict(model.named_modules()).get(sampled), files)

    for options in to_inject:
        inject(model, **_cut(options, rank))
    state = model.state_dict()
    with torch.no_grad():
        for name, value in (plan | head_plan).items():
            put(state[name], value)
    take_spread(lora_layers(model), files.facts if files else {})
    return fresh


def _cut(options: dict, rank: int | None) -> dict:
    """The options of ``inject`` for the adapter cut to ``rank``; a strength of alpha/r stays what it is."""
    b = options["r"] if rank is None else min(rank, options["r"])
    alpha = options["lora_alpha"] * (b / options["r"] if options["scaling"] == "alpha/r" else 1)
    return options | {"r": b, "lora_alpha": alpha}


def _layers_of(model: nn.Module, files: AdapterFiles) -> list[dict]:
    """The calls of ``inject`` that make the layers which the file holds: one per rank and strength."""
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = defaultdict(list)
    for _, name, factor, value in files.factors():
        if factor != "A":
            continue
        if name not in modules:
            raise ValueError(
                f"{files.path} adapts {name!r}, which {type(model).__name__} does not have: it is for another model."
            )
        if value.ndim > 2 and value.shape[2:].numel() > 1 and not files.has_own_convolutions:
            raise ValueError(
                f"{files.path} adapts the convolution {name!r} in PEFT's way, whose components are none of loralib's; "
                "use it with PEFT."
            )
        r, rule = value.shape[0] // math.prod(getattr(modules[name], "kernel_size", ())), files.scaling_of(name)
        alpha = peft_format.tidy(files.strength(name) / scale(r, r, 1, rule))
        groups[r, alpha, rule].append(name)
    if not groups:
        raise ValueError(f"{files.path} holds no LoRA factors.")
    heads = files.config.get("modules_to_save")
    if heads is not None:  # PEFT lists the usual names of heads, whether the model has them or not
        heads = [head for head in heads if any(is_inside(name, [head]) for name in modules)]
    # A regular expression in brackets, so that a name matches itself and no longer one that ends with it.
    return [
        {
            "target_modules": f"(?:{'|'.join(map(re.escape, names))})",
            "r": r,
            "lora_alpha": alpha,
            "scaling": rule,
            "modules_to_save": heads,
            "lora_dropout": files.config.get("lora_dropout") or 0.0,
        }
        for (r, alpha, rule), names in groups.items()
    ]


def _adapter_plan(
    model: nn.Module, tensors, in_peft_format: bool, path: Path, rank: int | None
) -> dict[str, torch.Tensor]:
    """The value of every factor of ``model``, checked: {parameter's name: tensor}."""
    plan: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, layer in lora_layers(model):
        names = peft_format.keys(layer, name) if in_peft_format else (f"{name}.lora_A", f"{name}.lora_B")
        if any(key not in tensors for key in names):
            raise ValueError(
                f"{path} holds no factors for layer {name!r}: it was made for another model or other target modules."
            )
        used.update(names)
        A, B = (tensors[key] for key in names)
        if in_peft_format:
            A, B = peft_format.from_peft(layer, name, A, B)
        at = A.shape[0] // (layer.projections * layer.rows)
        wanted = layer.r if rank is None else min(rank, at)
        if at != layer.r and not (rank is not None and layer.r == wanted):
            raise ValueError(
                f"{path} has rank {at} at layer {name!r}, the model r = {layer.r}; build the model with r={at}"
                + (f", or load with rank={layer.r}." if at > layer.r else ".")
            )
        shape_A, shape_B = (tuple(factor.shape) for factor in (layer.lora_A, layer.lora_B))
        A = A.view(layer.projections, at, layer.rows, -1)[:, :wanted].flatten(0, 2) if A.numel() else A
        B = B.view(B.shape[0], at, layer.rows)[:, :wanted].flatten(1)
        if tuple(A.shape) != shape_A or tuple(B.shape) != shape_B:
            raise ValueError(
                f"{path} has factors of shape {tuple(A.shape)} and {tuple(B.shape)} for layer {name!r}, the model "
                f"{shape_A} and {shape_B}: it is for another base model."
            )
        plan |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    left = [key for key in tensors if factor_in(key) and key not in used]
    if left:
        raise ValueError(
            f"{path} holds {left[0]!r}, for which the model has no loralib layer; adapt the same target modules."
        )
    return plan


def _head_plan(model: nn.Module, tensors, path: Path, head: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The modules to save: the values to load, and the modules that keep their own."""
    plan: dict[str, torch.Tensor] = {}
    fresh: list[str] = []
    state = model.state_dict()
    for module in modules_to_save(model):
        wanted = {key: value for key, value in state.items() if is_inside(key, [module])}
        names = {key: peft_format.clean(key) for key in wanted}
        given = {key: tensors.get(peft_format.PREFIX + name, tensors.get(name)) for key, name in names.items()}
        wrong = [key for key in wanted if given[key] is None or given[key].shape != wanted[key].shape]
        if not wrong:
            plan |= given
        elif head == "fresh":
            fresh.append(module)
        else:
            what = (
                "does not hold it" if given[wrong[0]] is None else f"has it with shape {tuple(given[wrong[0]].shape)}"
            )
            raise ValueError(
                f"the model needs {wrong[0]!r} of shape {tuple(wanted[wrong[0]].shape)}, and {path} {what}; build the "
                "model with the adapter's number of labels, or train the head anew."
            )
    return plan, fresh


def _labels_in_order(model: nn.Module, files: AdapterFiles, plan: dict[str, torch.Tensor], head: str) -> None:
    """Put the rows of the file's head in the order of the model's labels, by their names.

    Raises ValueError, with ``head="require"``, if these are other labels; where either side has no names, numbers
    count.
    """
    stored = files.facts.get("labels") or ()
    wanted = labels.names_of(model, stored)
    source = labels.told(stored, wanted)
    if not source or not wanted or not plan:
        return
    order = labels.places(source, wanted)
    if order is None:
        if head == "require":
            raise ValueError(
                f"{files.path} knows the labels {', '.join(source)}, the model {', '.join(wanted)}; a head answers "
                "only for its own."
            )
        return
    for key in labels.output_keys(model, len(order)):
        if key in plan:
            plan[key] = plan[key][order]
