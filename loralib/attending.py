"""Two questions that a call of a model answers, asked by hooks on the model: does every adapter act, and where do the
examples of a batch stand. The first is looked at in a model's first call, the second when a layer needs to know."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from . import learning
from .acting import Watch, first_call, keep_off_fast_path, look_again
from .layers import LoRALayer, adapted_layers
from .layout import Call, calls

_UNKNOWN = "lora_layout_unknown"  # an attribute of the model, so that a compiled one need not search its layers
_watches: dict[int, Watch] = {}  # by the call that they watch


def attend(model: nn.Module, layers: list[LoRALayer] | None = None) -> None:
    """Watch the calls of ``model`` from here on, and those of its parts that ``generate`` calls in its place;
    ``layers``: those that run with one rank per example from here on."""
    if isinstance(model, LoRALayer):
        return
    if not _is_attended(model):
        keep_off_fast_path(model)
        for module in [model, *_called_alone(model)]:
            if not _is_attended(module):
                module.register_forward_pre_hook(_enter, with_kwargs=True)
                module.register_forward_hook(_judge)
                module.register_forward_hook(_leave, always_call=True)
        look_again(model)
    if any(layer.layout is None for layer in layers or []):
        for module in filter(_is_attended, model.modules()):
            setattr(module, _UNKNOWN, True)


def _is_attended(module: nn.Module) -> bool:
    return _enter in module._forward_pre_hooks.values()


def _called_alone(model: nn.Module) -> list[nn.Module]:
    """The modules that ``generate`` calls and not the model around them: the one inside PEFT's model, an encoder."""
    found: list[Any] = [module for module in model.modules() if hasattr(type(module), "generate")]
    pairs = [module for module in found if getattr(getattr(module, "config", None), "is_encoder_decoder", False)]
    found += [module.get_encoder() for module in pairs if hasattr(type(module), "get_encoder")]
    return [module for module in dict.fromkeys(found) if module is not model and isinstance(module, nn.Module)]


def attend_anew(model: nn.Module) -> None:
    """The same of a model that has other layers than before: its next call is its first one."""
    attend(model)
    keep_off_fast_path(model)
    look_again(model)


def _enter(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _forget_broken_off()
    if getattr(model, _UNKNOWN, False) and (compiling or not learning.passes_run()):
        _learn(model, args, kwargs)
    if compiling or learning.passes_run():
        return
    call = Call(model, args, kwargs, learning.learn, sys._getframe(1))
    calls().append(call)
    # What runs within another call is looked at there. A decoder's step of generate runs on what the encoder gave
    # before: it says nothing of the encoder's layers.
    whole = len(calls()) == 1 and kwargs.get("encoder_outputs") is None
    watch = first_call(model) if whole else None
    if watch is not None:
        _watches[id(call)] = watch


def _forget_broken_off() -> None:
    """Of calls that ended by Ctrl-C or another BaseException no hook tells: their frames run no more."""
    if not calls():
        return
    frame, running = sys._getframe(1), set()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back  # type: ignore[assignment]
    for call in [call for call in calls() if call.frame not in running]:
        _end(call)


def _end(call: Call) -> None:
    calls().remove(call)
    watch = _watches.pop(id(call), None)
    if watch is not None:
        watch.close()


def _learn(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if learning.passes_run():  # a model that is compiled in place is traced in these passes too
        return

    def unknown() -> bool:
        return any(layer.layout is None and layer.state.learn for _, layer in adapted_layers(model))

    if unknown():  # else it was declared since, or the ranks are no longer those of examples
        learn = learning.learn_layout
        if "torch._dynamo" in sys.modules:  # its import takes a second, and without it nothing is compiled
            learn = torch.compiler.disable(learn)
        learn(model, *args, **kwargs)
    left = unknown()  # a single example tells nothing
    for module in [model, *(module for module in model.modules() if _UNKNOWN in module.__dict__)]:
        setattr(module, _UNKNOWN, left)


# A mark of torch.compiler.disable's: a compiler leaves its graph here.
_learn._torchdynamo_disable = True  # type: ignore[attr-defined]


def _running(model: nn.Module) -> Call | None:
    """The innermost call, if it is one of this model; the hooks may have been put on within a call, whose end they then
    see."""
    if torch.compiler.is_compiling() or learning.passes_run() or not calls() or calls()[-1].model is not model:
        return None
    return calls()[-1]


def _judge(model: nn.Module, args: tuple, output: Any) -> None:
    call = _running(model)
    if call is not None and id(call) in _watches:
        _watches[id(call)].judge()


def _leave(model: nn.Module, args: tuple, output: Any) -> None:
    call = _running(model)
    if call is not None:
        _end(call)


def attend_no_more(model: nn.Module) -> None:
    """Take the hooks off: of a model that is plain again."""
    for module in filter(_is_attended, model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter, _judge, _leave)]:
                del hooks[key]
                for marks in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    marks.pop(key, None)
