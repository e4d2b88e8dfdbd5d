"""Which rows of a layer's input belong to which example of the batch: what one rank per example needs to know.

A model hands its layers the batch in many shapes. For n examples, in the first dimension or the second:

    (n, ..)        one row for each example                            most models
    (s, n, ..)     the examples in the second dimension                sequence-first models
    (n * k, ..)    k rows an example: 0 0 0 1 1 1 2 2 2 ("in turn")    tokens or choices flattened into the batch
    (k * n, ..)    k rows an example: 0 1 2 0 1 2 0 1 2 ("tiled")      sequence-first and flattened
    (1, ..)        the same for all examples                           positions

A ``Layout`` says which. It is found by comparing what a layer gets for a batch with what it gets for single examples
(``infer``), or declared; never guessed from one shape.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

# What is the same in a batch and alone differs by rounding (up to 1e-3 in fp32, 5e-2 in bf16), other content by about
# 1.
SAME, SAME_ROUNDED = 0.01, 0.1
UNREACHED = "it was not reached when the model ran its examples one by one"
ALIKE = "the examples of this batch are too alike to tell them apart (call the model with others first)"
CHANGING = "how many rows it gets depends on what the examples hold, as in a mixture of experts"


class LayoutError(ValueError):
    """Ranks of examples cannot be told to the rows of a layer's input."""


@dataclass(frozen=True)
class Layout:
    """Where the examples stand in a layer's input.

    Args:
        dim: the dimension that they stand in, 0 or 1.
        rows: rows an example has there; None: any number.
        tiled: whether rows stand tiled rather than in turn.
        source: (name, dims) if ``rows`` is the product of these dimensions of that input of the model, and changes with
            it.
        shared: whether inputs with 1 in the first dimension are the same for all examples; the output then has n.
        declared: whether it was said, and is not to be learnt.
    """

    dim: int = 0
    rows: int | None = 1
    tiled: bool = False
    source: tuple[str, tuple[int, ...]] | None = None
    shared: bool = False
    declared: bool = False

    def fits(self, shape: torch.Size, n: int, call: Call | None) -> bool:
        """Whether an input of this shape can hold n examples so, in this call of the model."""
        if self.shared and shape[0] == 1:
            return True
        size = shape[self.dim] if self.dim < len(shape) else 0
        rows = self.rows
        if self.source is not None:  # within a recomputation no call is known: the first pass was looked at
            rows = None if call is None else call.rows(self.source)
        return size > 0 and (size % n == 0 if rows is None else size == n * rows)

    def spread(self, gate: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gate (n, r) for an input of this shape: (rows, r), or (1, n, r) for examples in the second dimension."""
        if self.dim == 1:
            return gate[None]
        rows = shape[0] // len(gate)
        if rows <= 1:
            return gate
        return gate.repeat(rows, 1) if self.tiled else gate.repeat_interleave(rows, 0)


FIRST = Layout(shared=True)  # what a layer's own set_rank takes its input for
ANY = Layout(rows=None)  # all rows are those of a single example


@dataclass(eq=False)
class Call:
    """A call of a model that runs: what layers may ask about the batch that they get a part of."""

    model: torch.nn.Module
    args: tuple
    kwargs: dict[str, Any]
    learn: Callable[[Call, int], None]
    frame: Any = None  # that runs as long as the call
    checked: set[int] = field(default_factory=set)

    def shapes(self) -> dict[str, torch.Size]:
        leaves, _ = tree_flatten_with_path((self.args, self.kwargs))
        return {
            "".join(map(str, path)): leaf.shape for path, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim
        }

    def rows(self, source: tuple[str, tuple[int, ...]]) -> int:
        name, dims = source
        shape = self.shapes().get(name, ())
        return math.prod(shape[d] for d in dims) if len(shape) > max(dims) else -1

    def check(self, n: int) -> None:
        """Raise LayoutError if no input of the model has n examples."""
        if n in self.checked:
            return
        shapes = self.shapes()
        if shapes and not any(n in shape[:2] for shape in shapes.values()):
            got = ", ".join(sorted({str(tuple(shape)) for shape in shapes.values()}))
            raise LayoutError(
                f"{n} ranks are set, and {type(self.model).__name__} got inputs of shape {got}; set one rank for each "
                "of its rows (for beams or repeated examples: ranks.repeat_interleave(num_beams))."
            )
        self.checked.add(n)


_running = threading.local()


def calls() -> list[Call]:
    """The calls that run in this thread, the outermost first."""
    if not hasattr(_running, "calls"):
        _running.calls = []
    return _running.calls


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors with a dimension or more of a batch or an output, in order; mappings of any class are entered."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found += [leaf] if leaf.ndim else []
        elif hasattr(leaf, "items"):  # torch takes a UserDict, which transformers' BatchEncoding is, for a leaf
            found += tensors_in(dict(leaf))
    return found


def examples_in(batch: Any) -> int:
    """How many examples a batch has: the rows of its first tensor. Raises ValueError if it holds none."""
    for tensor in tensors_in(batch):
        return len(tensor)
    raise ValueError(
        f"A batch is {type(batch).__name__} without a tensor, so it does not say how many examples it has."
    )


# --- finding a layout ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """One input of a layer: its shape, and a number for each place in its first dimensions that examples may stand
    in."""

    shape: torch.Size
    print: torch.Tensor
    rounded: bool = False  # whether it may have been computed in 16 bits

    @classmethod
    def of(cls, x: torch.Tensor, places: int) -> Seen:
        """``places``: how many of the first dimensions, at most 2, can hold the examples."""
        places = min(places, 2, x.ndim)
        flat = x.detach().reshape(*x.shape[:places], -1).float().nan_to_num(0.0, 0.0, 0.0)
        weights = torch.randn(flat.shape[-1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        with torch.autocast(x.device.type, enabled=False):
            marks = (flat @ weights.to(flat.device)).cpu()
        rounded = torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.float16, torch.bfloat16)
        return cls(x.shape, marks, rounded)


def same(one: torch.Tensor, other: torch.Tensor, rounded: bool) -> bool:
    """Whether two tensors of numbers are equal but for rounding."""
    return float((one - other).norm()) <= (SAME_ROUNDED if rounded else SAME) * float(other.norm())


def distinct(prints: Sequence[torch.Tensor]) -> bool:
    """Whether each of these differs from the others by more than rounding in fp32."""
    pairs = [(a, b) for i, a in enumerate(prints) for b in prints[:i]]
    return all(a.shape != b.shape or float((a - b).norm()) > 1e-4 * float(b.norm()) for a, b in pairs)


def infer(batch: Seen, alone: Sequence[tuple[int, Seen]], n: int) -> list[Layout] | str:
    """The layouts in which ``batch``, an input for n examples, holds what the single examples i of ``alone`` gave.

    Or a reason why there is none. Several: the examples are too alike to tell them apart.
    """
    shapes = {seen.shape for _, seen in alone}
    if len(shapes) != 1 or len(batch.shape) != len(alone[0][1].shape):
        return CHANGING
    (single,) = shapes
    if batch.shape == single:
        if batch.shape[:1] == (1,) and all(same(batch.print, seen.print, batch.rounded) for _, seen in alone):
            return [Layout(shared=True)]
        return "its input has no dimension for the examples"
    found = []
    for dim in range(batch.print.ndim):
        rows = single[dim]
        others = [d for d in range(len(single)) if d != dim]
        if batch.shape[dim] != n * rows or any(batch.shape[d] != single[d] for d in others) or (dim and rows != 1):
            continue
        for tiled in (False, True)[: 1 + (rows > 1)]:
            each = torch.arange(rows, device="cpu")
            places = {i: each * n + i if tiled else each + i * rows for i, _ in alone}
            if all(same(batch.print.index_select(dim, places[i]), seen.print, batch.rounded) for i, seen in alone):
                found.append(Layout(dim, rows, tiled))
    return found or "its rows in a batch are not those of the examples one by one"


def agreed(rounds: Sequence[Sequence[list[Layout] | str]], shapes: dict[str, torch.Size], n: int) -> Layout | str:
    """The one layout that fits every call of a layer in every round, or a reason why there is none.

    ``shapes``: those of the model's inputs for n examples, among which the number of rows may be found.
    """
    shared, left = False, None
    for found in (found for calls_of in rounds for found in calls_of):
        if isinstance(found, str):
            return found
        if found[0].shared:
            shared = True
            continue
        left = found if left is None else [layout for layout in left if layout in found]
        if not left:
            return "it gets the examples now in one dimension or order, now in another"
    if left is None:
        return Layout(shared=True)
    if len(left) > 1:
        return ALIKE
    (layout,) = left
    return replace(layout, shared=shared, source=_source(layout.rows or 1, shapes, n))


def _source(rows: int, shapes: dict[str, torch.Size], n: int) -> tuple[str, tuple[int, ...]] | None:
    """An input of the model and those of its dimensions whose product is ``rows``."""
    if rows == 1:
        return None
    for name, shape in shapes.items():
        for batch in (d for d in (0, 1) if shape[d : d + 1] == (n,)):
            others = [d for d in range(len(shape)) if d != batch]
            for end in range(1, len(others) + 1):
                if math.prod(shape[d] for d in others[:end]) == rows:
                    return name, tuple(others[:end])
    return None


# --- asking for a layout ------------------------------------------------------------------------------


class HasLayout(Protocol):
    """What is needed of a layer here."""

    layout: Layout | str | None

    def described(self) -> str:
        """How an error message names the layer."""


WAY_OUT = "train with one rank a step (sampling 'step'), or leave the layer out of target_modules"


def layout_of(layer: HasLayout, shape: torch.Size, n: int) -> Layout:
    """The layout of an input of this shape that holds n examples; learnt now where it is not known.

    Raises LayoutError where there is none, or where it cannot be learnt.
    """
    running = calls()
    if running:
        running[0].check(n)
    if n == 1:
        return ANY
    if (known := _fitting(layer, shape, n)) is not None:
        return known
    if not (isinstance(layer.layout, Layout) and layer.layout.declared):
        for call in list(running):
            call.learn(call, n)
            if (learnt := _fitting(layer, shape, n)) is not None:
                return learnt
    if isinstance(layer.layout, str):
        raise LayoutError(f"{layer.described()} cannot run with one rank per example: {layer.layout}; {WAY_OUT}.")
    got = f"{layer.described()} got an input of shape {tuple(shape)} for {n} ranks"
    if not running:
        raise LayoutError(
            f"{got} outside a call of the model that they were set on; call that model, or say where the examples "
            "stand with loralib.declare_layout(model, 0)."
        )
    raise LayoutError(f"{got}, which cannot hold one row or more for each; {WAY_OUT}.")


def _fitting(layer: HasLayout, shape: torch.Size, n: int) -> Layout | None:
    """The layer's layout, if an input of this shape can hold n examples so."""
    found = layer.layout
    return found if isinstance(found, Layout) and found.fits(shape, n, next(iter(calls()), None)) else None
