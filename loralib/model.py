"""The whole model at once: put layers in, set ranks, choose what trains."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .adapting import adapt
from .attending import attend, attend_anew
from .checks import check_int
from .gate import check_rank, matryoshka_gate
from .heads import default_head, is_inside, modules_to_save, say_what_moves_beside, tied
from .inside_peft import refuse_layers_without_ranks
from .layers import LoRALayer, adapted_among
from .parts import component_size, own_ranks, part, rank_of
from .pretrained import guard_pretrained
from .quantised import keep_gradients
from .sharding import is_managed
from .state import RankState, set_states
from .targets import chosen_layers, layer_options, matches
from .walking import named_modules, unwrapped


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The adapted layers with their names, in the model's order; each learns its name for error messages.

    Raises ValueError if there are none, or if one of PEFT's should have ranks and has none.
    """
    modules = named_modules(model)  # this runs in every step: one walk for all
    refuse_layers_without_ranks(model, modules)
    keep_gradients(module for _, module in modules)
    layers = adapted_among(modules)
    for name, layer in layers:
        vars(layer)["module_name"] = name  # as ``set_states`` does
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no loralib layer with r > 0; call loralib.inject(model, ...) first."
        )
    return layers


def has_lora(model: nn.Module) -> bool:
    """Whether the model has an adapter. Raises ValueError for one of PEFT's that should have ranks and has none."""
    modules = named_modules(model)
    refuse_layers_without_ranks(model, modules)
    return bool(adapted_among(modules))


# --- putting layers in --------------------------------------------------------------------------------


def inject(
    model: nn.Module,
    target_modules: str | list[str] | None,
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    scaling: str = "alpha/r",
    modules_to_save: str | list[str] | None = None,
    *,
    exclude_modules: str | list[str] | None = None,
    layers_to_transform: int | list[int] | None = None,
    layers_pattern: str | list[str] | None = None,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Replace the matching layers of ``model`` in place by loralib's and return the model.

    Handles nn.Linear, nn.Embedding, nn.Conv2d, Hugging Face's Conv1D and subclasses that compute the same (see
    ``loralib.adapting``). Each new layer holds the old one as its ``base_layer``, calls it and shares its parameters;
    their weights are frozen (``mark_only_lora_as_trainable`` freezes the rest of the model). The words are those of
    PEFT's ``LoraConfig``.

    Args:
        target_modules: a list of names or endings of names; a string, a regular expression for the whole name (or one
            ending); "all-linear", every linear layer but the output layer; None, the architecture's usual layers, by
            PEFT's own table, where PEFT is installed.
        r: maximum rank r_max, 1 or more.
        lora_alpha: alpha of the scaling rule, above 0; None: 2 r.
        lora_dropout: dropout probability on the adapter's input.
        scaling: strength at rank b: "alpha/r" (one strength for all ranks), "alpha/b" (the paper's) or "alpha/sqrt(b)".
        modules_to_save: names of modules that train in full and are saved with the adapter. Default: the head of a
            transformers classifier, nothing otherwise. They are never adapted. Weights that they are tied to stay
            frozen.
        exclude_modules: layers to leave out, named as in ``target_modules``.
        layers_to_transform: numbers of the layers to adapt; others are left out.
        layers_pattern: what stands before that number in names, where it is not the last number.
        rank_pattern: other r for some layers, {ending of names as a regular expression: r}. At rank b a layer runs at
            min(b, its r).
        alpha_pattern: other alpha, the same way.
        autocast_adapter_dtype: keep the factors of bf16 and fp16 layers in fp32 (default); False: in the layer's dtype.

    Raises ValueError if a rank is below 1, if nothing matches (naming what could have), if a layer that matches
    computes in its own way, or if a module to save does not exist; the model is unchanged then.
    """
    for what, names_given in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        listed = [] if names_given is None or isinstance(names_given, str) else names_given
        if not isinstance(listed, (list, tuple, set)) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{what} is {names_given!r}; give names of layers, or a regular expression.")
    for what, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if pattern is not None and not isinstance(pattern, Mapping):
            raise ValueError(f"{what} is {pattern!r}; give a dictionary of endings of names.")
    check_int("r", r, 1, math.inf, "inject needs a maximum rank of 1 or more.")
    if isinstance(modules_to_save, str):
        modules_to_save = [modules_to_save]
    heads = default_head(model) if modules_to_save is None else modules_to_save
    heads = list(dict.fromkeys([*getattr(model, "lora_modules_to_save", []), *heads]))  # of an earlier call too
    modules = dict(model.named_modules(remove_duplicate=False))
    for head in heads:
        if not any(matches(name, [head]) for name in modules):
            raise ValueError(f"modules_to_save names {head!r}, which {type(model).__name__} does not have.")
    if unwrapped(model) is not model:
        raise ValueError(
            f"{type(model).__name__} is around the model and would not see what is put in now: call inject first."
        )
    if any(is_managed(module) for module in modules.values()):
        raise ValueError(
            f"{type(model).__name__} is spread over processes already, and FSDP would not see what is put in now: call "
            "inject before fully_shard."
        )
    names = chosen_layers(model, modules, heads, target_modules, exclude_modules, layers_to_transform, layers_pattern)
    for name in names:
        if modules[name].weight.is_meta and hasattr(modules[name], "_hf_hook"):
            raise ValueError(f"{name} is offloaded by accelerate: its weight is not here to be adapted, load it whole.")
    copied = tied(model, heads)
    options = layer_options(names, r, lora_alpha, rank_pattern, alpha_pattern)
    layers = adapt(modules, options, lora_dropout=lora_dropout, scaling=scaling, in_fp32=autocast_adapter_dtype)
    keep_gradients(model.modules())
    around_module = {id(layer.base_layer): layer for layer in layers.values()}
    for name, module in modules.items():  # a module under two names is one adapted layer under both
        if id(module) in around_module:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, around_module[id(module)])
    setattr(model, "lora_modules_to_save", heads)  # noqa: B010  # plain data, which modules are not typed to hold
    for module, name in copied:
        shared = module.get_parameter(name)
        setattr(module, name, nn.Parameter(shared.detach().clone(), shared.requires_grad))
        setattr(model, "lora_untied", True)  # noqa: B010
    say_what_moves_beside(modules, heads)
    attend_anew(model)
    guard_pretrained(model)
    return model


# --- ranks --------------------------------------------------------------------------------------------


def max_rank(model: nn.Module) -> int:
    """r_max: the highest rank of any layer."""
    return max(layer.r for _, layer in lora_layers(model))


def adapter_parameters(model: nn.Module, rank: int) -> int:
    """How many numbers the adapter has when cut to ``rank``."""
    return sum(component_size(layer) * part(layer, rank) for _, layer in lora_layers(model))


def scaling_of(model: nn.Module) -> str:
    """The scaling rule of all layers, or "several" where they differ."""
    rules = {layer.scaling for _, layer in lora_layers(model)}
    return rules.pop() if len(rules) == 1 else "several"


def set_rank(model: nn.Module, rank, frozen: bool = False) -> None:
    """Run the whole model at ``rank``: an int in 0..r_max, or a LongTensor (batch,), one rank per example.

    A float tensor (batch, r_max) gives each example weights of the ranks 1..r_max: it runs through the weighted sum of
    their gates, which trains several ranks at once. A layer with a smaller r runs at min(rank, r); where importance
    spread the ranks, at its part. ``frozen``: see ``LoRALayer.set_rank``. Raises TypeError or ValueError for what is no
    rank and for ``frozen`` where ranks are spread, RuntimeError if a layer is merged; no layer is changed then.

    A model has one rank at a time, for whoever calls it: two threads that need different ranks need a copy each, or one
    rank per example.
    """
    model = unwrapped(model)
    layers = lora_layers(model)
    rank = check_rank(rank, max(layer.r for _, layer in layers))
    shared: dict[tuple, RankState] = {}  # layers of one kind run in one state
    states = []
    weighted = isinstance(rank, torch.Tensor) and rank.is_floating_point()
    if frozen and any(layer.components_at for _, layer in layers):
        raise ValueError("Ranks are spread over the layers by importance, and no component is the rank's own to train.")
    for _, layer in layers:
        if isinstance(rank, int):
            states.append((layer, RankState(part(layer, rank), None, bool(frozen))))
            continue
        kind = (layer.r, layer.lora_alpha, layer.scaling, layer.gate_dtype())
        key = (*kind, layer.weight.device, layer.components_at, layer.strength_at)
        if key not in shared:
            ranks = own_ranks(layer, rank)
            gate = layer.gate_of(ranks).to(layer.weight.device)  # one transfer, not a kernel for each step of it
            shared[key] = RankState(None if weighted else ranks, gate, bool(frozen), learn=layer is not model)
        states.append((layer, shared[key]))
    attend(model, [layer for layer, state in states if state.learn])
    set_states(states)


def set_gate(model: nn.Module, gate: torch.Tensor) -> None:
    """Multiply the components of every layer by ``gate``, a float tensor (r_max,) or (batch, r_max), scaling included.

    A layer with a smaller r uses the first r columns. Raises TypeError, ValueError, or RuntimeError if one is merged.
    """
    model = unwrapped(model)
    layers = lora_layers(model)
    r_max = max(layer.r for _, layer in layers)
    if isinstance(gate, torch.Tensor) and gate.ndim in (1, 2) and gate.shape[-1] != r_max:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; give ({r_max},) or (batch, {r_max}).")
    columns = isinstance(gate, torch.Tensor) and gate.ndim in (1, 2)
    attend(model, [layer for _, layer in layers] if columns and gate.ndim == 2 else None)
    set_states(
        [
            (layer, layer.gate_state(gate[..., : layer.r] if columns else gate, learn=layer is not model))
            for _, layer in layers
        ]
    )


def set_matryoshka_gate(model: nn.Module, ranks=None, reduce: str = "sum") -> None:
    """Train all ``ranks`` (default: 1..r_max) at once by ``matryoshka_gate``; raises as it, and as ``set_gate``."""
    layers = lora_layers(model)
    r_max = max(layer.r for _, layer in layers)
    ranks = [check_rank(b, r_max) for b in (range(1, r_max + 1) if ranks is None else ranks)]
    gates = [
        matryoshka_gate(
            layer.r, layer.lora_alpha, layer.scaling, [part(layer, b) for b in ranks], reduce, layer.strength_at
        )
        for _, layer in layers
    ]
    set_states([(layer, layer.gate_state(gate)) for (_, layer), gate in zip(layers, gates, strict=True)])


def get_rank(model: nn.Module):
    """The rank that the model runs at: an int, a LongTensor (batch,), or None after ``set_gate`` and weights of
    ranks."""
    return rank_of([layer for _, layer in lora_layers(model)])


@contextlib.contextmanager
def use_rank(model: nn.Module, rank) -> Iterator[nn.Module]:
    """``with use_rank(model, 4): ...`` runs the body at a rank and puts the former state back, also on an exception."""
    before = [(layer, layer.state) for _, layer in lora_layers(model)]
    set_rank(model, rank)
    try:
        yield model
    finally:
        still = {id(layer) for _, layer in adapted_among(named_modules(model))}  # a merge in place has taken them out
        set_states((layer, state) for layer, state in before if id(layer) in still)


# --- what trains, what is kept ------------------------------------------------------------------------


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but the adapters (as in microsoft/LoRA) and the modules to save (a classifier's head).

    ``bias``: "none", "all" (train every bias) or "lora_only" (the biases of the adapted layers). Raises ValueError for
    a model of PEFT's.
    """
    _check_bias(bias)
    _refuse_peft(model, "get_peft_model has marked what trains: leave this call out")
    setattr(model, "lora_bias", bias)  # noqa: B010
    attend(model)
    heads = modules_to_save(model)
    adapted = {f"{name}.bias" for name, _ in lora_layers(model)}
    trained: set[nn.Parameter] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a module may have two names
        leaf = name.rpartition(".")[2]
        if (
            leaf in ("lora_A", "lora_B")
            or is_inside(name, heads)
            or (bias == "all" and leaf == "bias")
            or (bias == "lora_only" and name in adapted)
        ):
            trained.add(parameter)
    for parameter in model.parameters():
        parameter.requires_grad = parameter in trained


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, torch.Tensor]:
    """The adapters' entries of ``model.state_dict()``, with the biases that ``bias`` names, as in microsoft/LoRA.
    Raises ValueError for a model of PEFT's."""
    _check_bias(bias)
    _refuse_peft(model, "take peft.get_peft_model_state_dict(model)")
    state = model.state_dict()
    kept = {key for key in state if key.rpartition(".")[2] in ("lora_A", "lora_B")}
    if bias == "all":
        kept |= {key for key in state if key.rpartition(".")[2] == "bias"}
    elif bias == "lora_only":
        kept |= {f"{name}.bias" for name, _ in lora_layers(model)} & state.keys()
    return {key: value for key, value in state.items() if key in kept}


def refuse_trained_biases(model: nn.Module) -> None:
    """Raise ValueError for a model whose biases train beside the adapter: its files have no place for them."""
    if getattr(model, "lora_bias", "none") != "none":
        raise ValueError(
            f"bias = {model.lora_bias!r} trained biases, which an adapter's files do not hold; save them with "
            f"torch.save(loralib.lora_state_dict(model, bias={model.lora_bias!r}), path)."
        )


def _refuse_peft(model: nn.Module, instead: str) -> None:
    if any(not isinstance(model.get_submodule(name), LoRALayer) for name, _ in lora_layers(model)):
        raise ValueError(f"The adapter of this {type(model).__name__} is PEFT's to keep; {instead}.")


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {bias!r}; choose 'none', 'all' or 'lora_only'.")
