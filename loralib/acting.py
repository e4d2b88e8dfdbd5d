"""Whether every adapter acts: looked at in a model's first call.

An adapted layer acts when it is called. Some modules only read a layer's ``weight`` (Mamba its dt_proj, WavLM its
projections) and compute on their own: an adapter there would have no effect, at any rank. So in the first call it is
noted which adapted layers are called, and of which others the weight is read.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn

from .layers import LoRALayer, adapted_layers

_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_open: list[Watch] = []


def do_nothing(module: nn.Module, args: tuple) -> None:
    """A hook. ``nn.TransformerEncoderLayer`` leaves its fast path, which reads weights, where a layer within has
    one."""


def keep_off_fast_path(model: nn.Module) -> None:
    """Have nn.TransformerEncoderLayer call the adapted layers within, in evaluation too.

    nn.TransformerEncoder would make padded input nested for the fast path, which layers that are called do not take.
    """
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoder) and adapted_layers(parent):
            parent.use_nested_tensor = False
        if isinstance(parent, nn.TransformerEncoderLayer):
            for name, _ in adapted_layers(parent):
                module = parent.get_submodule(name)  # inside PEFT it is not the layer itself that stands there
                if do_nothing not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(do_nothing)


def look_again(model: nn.Module) -> None:
    """The next call of ``model`` is its first one, and so is that of a part by itself."""
    _looked_at.difference_update(model.modules())


def first_call(model: nn.Module) -> Watch | None:
    """A watch over the call that begins, if it is the model's first; to be closed with its end."""
    return None if model in _looked_at else Watch(model)


class Watch:
    """Notes, from here until ``close``, which adapted layers of a model are called and which weights are read."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.called: set[int] = set()
        self.read: set[int] = set()
        adapted = [layer for _, layer in adapted_layers(model)]
        weights = {id(own_weight(layer)) for layer in adapted} - {id(None)}
        twins = [m for m in model.modules() if m not in adapted and id(own_weight(m)) in weights]
        self.hooks = [module.register_forward_pre_hook(self._note) for module in [*adapted, *twins]]
        if not _open:
            LoRALayer.__getattr__ = _reading  # type: ignore[method-assign, assignment]
        _open.append(self)

    def _note(self, layer: nn.Module, args: tuple) -> None:
        self.called.add(id(layer))

    def close(self) -> None:
        _open.remove(self)
        if not _open:
            del LoRALayer.__getattr__
        for hook in self.hooks:
            hook.remove()

    def judge(self) -> None:
        """Raise ValueError for layers that can never act so; warn of layers that sat out."""
        silent = [(name, layer) for name, layer in adapted_layers(self.model) if id(layer) not in self.called]
        never = [name for name, layer in silent if id(layer) in self.read]
        if never:
            raise ValueError(
                f"{_listed(never)}: {type(self.model).__name__} reads the weight and does not call the layer, so an "
                "adapter would never act; leave it out of target_modules."
            )
        for name, layer in silent:
            other = self._runs_instead(layer)
            if other is not None:
                raise ValueError(
                    f"{name} is not called, since {other} has the same weight and runs in its place, so an adapter "
                    f"would never act; adapt {other} instead."
                )
        _looked_at.update(self.model.modules())
        if silent:
            warnings.warn(
                f"{_listed([name for name, _ in silent])}: adapted, and not called in the first pass of "
                f"{type(self.model).__name__}; what is never called learns nothing.",
                stacklevel=4,
            )

    def _runs_instead(self, layer: LoRALayer) -> str | None:
        """Another module of this one's kind with the very same weight that was called: T5's ``shared`` and its
        ``embed_tokens``."""
        kind = nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear
        for name, module in self.model.named_modules():
            same = own_weight(module) is own_weight(layer)
            if id(module) in self.called and isinstance(module, kind) and same:
                return name
        return None


def own_weight(module: nn.Module) -> torch.Tensor | None:
    """A module's parameter "weight"; of scripted ones too, whose parameters stand in no dictionary."""
    held = module._parameters
    if "weight" not in held:
        return None
    return held["weight"]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _reading(layer: LoRALayer, name: str) -> torch.Tensor | nn.Module:
    if name == "weight":
        for watch in _open:
            watch.read.add(id(layer))
    return nn.Module.__getattr__(layer, name)
