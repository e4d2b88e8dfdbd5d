"""Run one batch at several ranks: compute once what the ranks share, and let small batches go through together."""

import contextlib
import copy
import math
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .gate import check_rank
from .layers import LoRALayer
from .layout import LayoutError, examples_in, same
from .learning import aside, random_factors
from .model import lora_layers, max_rank, use_rank
from .sharding import is_sharded_model

# A small batch leaves a machine idle between its products: ranks are stacked into one pass while it stays within this
# many tokens. Measured on a CPU (results/benchmark, "All ranks"): at 192 tokens all together take 0.64 to 0.78 of the
# time of one after the other, at 2,048 0.99 to 1.15 times as long.
STACKED_TOKENS = 2048
_one_by_one: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose ranks cannot share a pass
_cuts: weakref.WeakKeyDictionary[nn.Module, dict] = (
    weakref.WeakKeyDictionary()
)  # where a model's outputs hold the batch
_sharing: weakref.WeakKeyDictionary[nn.Module, Callable[..., None]] = weakref.WeakKeyDictionary()


def at_ranks(
    model: nn.Module,
    inputs: dict[str, Any],
    ranks: Sequence[int],
    run: Callable[[dict[str, Any]], Any] | None = None,
    stack: bool | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run one batch at every rank of ``ranks``: yields (rank, output), in their order.

        with torch.no_grad():
            for rank, output in lora.at_ranks(model.eval(), inputs, range(1, 9)):
                print(rank, output.logits)

    What does not depend on the rank is computed once (see ``share_between_ranks``), in evaluation mode and without
    gradients; small batches go through together at several ranks, each example's rows its own. The model is back at its
    former rank whenever a pair is yielded, and so at the end, on ``close()`` and after an error.

    Args:
        inputs: what a pass takes, a batch's tensors (batch, ...) by name.
        ranks: ints in 0..r_max.
        run: makes a pass from such inputs; default ``model(**inputs)``. Of what it returns (a tensor, or a tuple, list
            or mapping of them) each tensor is cut to its rank, in the dimension in which it holds the batch.
        stack: whether several ranks may share a pass. Default: unless the inputs hold labels, since a loss would be the
            mean over the ranks of a pass; of a shared pass tensors without a batch dimension, and what is neither a
            tensor nor a plain value (caches), are None. A model that cannot take one rank per example, or whose outputs
            put examples together, goes rank by rank.

    Raises TypeError or ValueError for what is no rank.
    """
    r_max = max_rank(model)
    ranks = list(ranks)
    if any(isinstance(b, torch.Tensor) for b in ranks):
        raise TypeError("ranks holds a tensor; give ints: the whole batch runs at each of them.")
    ranks = [check_rank(b, r_max) for b in ranks]
    run = run or (lambda batch: model(**batch))
    code = getattr(run, "__code__", None)
    settings = _settings_of(run)
    stack = not any("label" in name for name in inputs) if stack is None else stack
    # Under FSDP a pass is all processes' together, and how many there are must not depend on the batch of each.
    stack = stack and model not in _one_by_one and not is_sharded_model(model)
    plan = passes(inputs, ranks, stack)
    shared = not model.training and not torch.is_grad_enabled()
    with share_between_ranks(model) if shared else contextlib.nullcontext(lambda *batches: None) as new_batch:
        new_batch(*(batch for _, _, batch in plan))

        def at(rank, batch):
            with use_rank(model, rank):
                return run(_own(batch))

        for group, rank, batch in plan:
            parts = _together(model, at, code, settings, group, rank, batch, inputs) if len(group) > 1 else None
            for place, b in enumerate(group):
                yield b, at(b, inputs) if parts is None else parts[place]


def _together(
    model: nn.Module, at, code, settings: list[Any], group: list[int], rank, batch, inputs
) -> list[Any] | None:
    """The outputs of several ranks, cut from those of a pass that they share; None if they cannot share one."""
    try:
        whole = at(rank, batch)
    except LayoutError:
        _one_by_one.add(model)
        return None
    except Exception:  # of an input that only looks as if it held the batch: rank by rank shows what is wrong
        return None
    leaves, spec = tree_flatten(whole)
    ndims = tuple(leaf.ndim if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
    # What makes the outputs is known by its code and its settings; another run's may hold the batch elsewhere.
    size = examples_in(inputs)
    kind = (code, ndims, *((name, _kind_of(value, size)) for name, value in inputs.items()), *settings)
    known = _cuts.setdefault(model, {}) if code is not None else {}
    if kind not in known or not all(map(_fits(size, len(group)), leaves, known[kind])):
        # With other factors and without dropout: at those at hand the ranks may be too alike to tell them apart.
        with aside(model), random_factors(model):
            probed, alone = tree_leaves(at(rank, batch)), tree_leaves(at(group[0], inputs))
        dims = [_batch_dim(x, y, len(group)) for x, y in zip(probed, alone, strict=True)]
        if "none" in dims:
            _one_by_one.add(model)
            return None
        known[kind] = [None if d is None else (d, x.shape[d] // size) for d, x in zip(dims, alone, strict=True)]
    dims = [None if cut is None else cut[0] for cut in known[kind]]
    return [
        tree_unflatten([_part(leaf, d, p, len(group)) for leaf, d in zip(leaves, dims, strict=True)], spec)
        for p in range(len(group))
    ]


def _kind_of(value: Any, size: int) -> Any:
    """What of an input may decide how a pass treats the batch: plain values, and shapes but for their numbers."""
    if isinstance(value, torch.Tensor):
        return value.ndim, value.dtype, bool(value.ndim) and len(value) == size
    return value if isinstance(value, (bool, int, float, str)) else type(value)


def _settings_of(run: Callable) -> list[Any]:
    """The flags and words that a function was made with, and of what type all else is: a number may be a counter."""
    cells = [cell for cell in getattr(run, "__closure__", None) or () if cell != types.CellType()]
    values = [cell.cell_contents for cell in cells]
    return [value if isinstance(value, (bool, str)) else type(value) for value in values]


PLAIN = (torch.Tensor, bool, int, float, str, type(None))


def _own(batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs for one pass; objects that it may change (caches) are copies."""
    if all(isinstance(value, PLAIN) for value in batch.values()):
        return batch
    leaves, spec = tree_flatten(dict(batch))
    return tree_unflatten([leaf if isinstance(leaf, PLAIN) else copy.deepcopy(leaf) for leaf in leaves], spec)


def _fits(size: int, parts: int) -> Callable[[Any, tuple[int, int] | None], bool]:
    """Whether an output holds the examples of so many ranks where, and as often, as such outputs did before."""
    return lambda leaf, cut: cut is None or leaf.shape[cut[0]] == parts * size * cut[1]


def _batch_dim(whole: Any, alone: Any, parts: int) -> int | str | None:
    """The dimension in which an output holds several ranks' examples, seen beside that of the first rank alone.

    None: no tensor, or one without examples. "none": what cannot be cut, since it puts examples together.
    """
    if not isinstance(whole, torch.Tensor) or whole.shape == alone.shape:
        return None
    grown = [d for d in range(whole.ndim) if whole.shape[d] != alone.shape[d]]
    if len(grown) != 1 or whole.shape[grown[0]] != parts * alone.shape[grown[0]]:
        return "none"
    first = _part(whole, grown[0], 0, parts).detach()
    return grown[0] if same(first.float(), alone.float(), rounded=True) else "none"


def _part(output: Any, dim: Any, place: int, parts: int) -> Any:
    if not isinstance(output, torch.Tensor):
        return output if isinstance(output, PLAIN) else None  # a cache of all ranks together is none's
    return None if dim is None else output.narrow(dim, place * (size := output.shape[dim] // parts), size)


def passes(inputs: dict[str, Any], ranks: list[int], stack: bool = True) -> list[tuple[list[int], Any, dict[str, Any]]]:
    """How to run one batch at ``ranks``: for each forward pass its ranks, what to set, and its inputs.

    Args:
        inputs: the model's inputs; the first tensor's numbers are the tokens (``input_ids`` of a text model).
        stack: let several ranks share a pass, up to ``STACKED_TOKENS``; the layers must take one rank per example then.
            The rows of the output are those of the pass's first rank, then those of its second, ..

    A pass holds no more tokens than that or than the batch itself, however many ranks there are. Inputs of which one is
    neither a tensor with a row for each example nor a plain value go through rank by rank.
    """
    size = examples_in(inputs)
    tokens = next(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)
    stack = stack and all(
        len(value) == size if isinstance(value, torch.Tensor) and value.ndim else isinstance(value, PLAIN)
        for value in inputs.values()
    )
    together = max(1, STACKED_TOKENS // max(1, tokens)) if stack else 1  # an image's numel is past any budget
    count = math.ceil(len(ranks) / together)
    groups = [ranks[i * len(ranks) // count : (i + 1) * len(ranks) // count] for i in range(count)]
    repeated = {1: inputs}
    for times in {len(group) for group in groups} - {1}:
        repeated[times] = {
            key: value.repeat(times, *[1] * (value.ndim - 1))
            if isinstance(value, torch.Tensor) and value.ndim
            else value
            for key, value in inputs.items()
        }
    return [
        (
            group,
            group[0] if len(group) == 1 else torch.tensor(group, device="cpu").repeat_interleave(size),
            repeated[len(group)],
        )
        for group in groups
    ]


@contextlib.contextmanager
def share_between_ranks(model: nn.Module) -> Iterator[Callable[..., None]]:
    """Within the body, what does not depend on the rank runs once per batch, however many ranks the batch is run at.

    That is every module without an adapter inside whose inputs no adapter has touched (embeddings, the first adapted
    block's other projections), and W0 x of an adapted layer with such an input; modules with forward hooks inside run
    each time. The body gets a function to call with each batch's inputs (one dict or several) before running it; they
    are recognised by identity, so run these same tensors. For inference only (eval mode, ``torch.no_grad``). What is
    kept is freed at the next batch: the embeddings' output and a few tensors of its size, whatever r_max is.
    ``at_ranks`` opens this for its batch; around a loop over many batches it is set up once:

        with torch.no_grad(), lora.share_between_ranks(model):
            for batch in batches:
                for rank, output in lora.at_ranks(model, batch, ranks):
                    ...
    """
    if model in _sharing:  # opened further out already, for many batches
        yield _sharing[model]
        return
    # Of each tensor that is the same at every rank: a name for what it holds. By id, so the tensor itself stands beside
    # it, and its version: one that was edited in place since is no longer what it was.
    untouched: dict[int, tuple[weakref.ref, int, Any]] = {}
    kept: dict[tuple, torch.Tensor] = {}

    def name_of(tensor: torch.Tensor) -> Any:
        reference, version, name = untouched.get(id(tensor), (lambda: None, 0, None))
        return name if reference() is tensor and version == tensor._version else None

    def trust(tensor: torch.Tensor, name: Any) -> None:
        if not tensor.is_inference():  # such a tensor counts no versions
            untouched[id(tensor)] = weakref.ref(tensor), tensor._version, name

    def once(module: nn.Module, compute):
        inside = list(module.modules())

        def run(*args, **kwargs):
            # A compiled graph has no identities to go by, and hooks inside want to see every pass.
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or any(map(_has_hooks, inside)):
                return compute(*args, **kwargs)
            values = (*args, *kwargs.values())
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            simple = all(isinstance(value, PLAIN) for value in values)
            if not tensors or not simple or any(name_of(tensor) is None for tensor in tensors):
                return compute(*args, **kwargs)
            told = (name_of(v) if isinstance(v, torch.Tensor) else (type(v), v) for v in values)
            name = (id(module), len(args), *kwargs, *told)
            if name in kept:
                output = kept[name].clone()  # whoever gets it may edit it
            else:
                output = compute(*args, **kwargs)
                if any(name_of(tensor) is None for tensor in tensors):
                    return output  # it changed an input in place, which a second run must do, too
                if not isinstance(output, torch.Tensor) or output.is_inference() or name_of(output) is not None:
                    return output
                kept[name] = output.clone()
            trust(output, name)
            return output

        return run

    def new_batch(*batches: dict) -> None:
        kept.clear()
        untouched.clear()
        for value in (value for inputs in batches for value in inputs.values()):
            if isinstance(value, torch.Tensor):
                trust(value, object())

    replaced: dict[tuple[nn.Module, str], Any] = {}

    def replace(module: nn.Module, name: str) -> None:
        if (module, name) not in replaced:
            replaced[module, name] = module.__dict__.get(name)
            run = once(module, getattr(module, name))

            def instead(me, *args, **kwargs):
                # A copy that is made meanwhile has this as its own method, and computes as its class does.
                return run(*args, **kwargs) if me is module else getattr(type(me), name)(me, *args, **kwargs)

            setattr(module, name, types.MethodType(instead, module))

    # Modules with an adapter inside are entered; the largest ones without run once; an adapted layer's base does.
    adapted = {model.get_submodule(name) for name, _ in lora_layers(model)}
    visited: dict[nn.Module, bool] = {}  # a module that stands in several places is visited once

    def visit(module: nn.Module) -> bool:
        """Set up all below a module; whether an adapter is inside."""
        if module not in visited:
            plain = [child for child in module.children() if not visit(child)]
            # What a layer of PEFT's gives depends on which adapter is active, too: it is entered, down to its parts.
            enter = module in adapted or hasattr(module, "_disable_adapters")
            visited[module] = enter or len(plain) < len(list(module.children()))
            if isinstance(module, LoRALayer) and module.r:
                replace(module, "base")
            elif visited[module]:
                for child in plain:
                    replace(child, "forward")
        return visited[module]

    try:
        visit(model)
        _sharing[model] = new_batch
        yield new_batch
    finally:
        _sharing.pop(model, None)
        for (module, name), before in replaced.items():
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        kept.clear()
        untouched.clear()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
