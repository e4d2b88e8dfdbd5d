"""Layers with a low-rank update that runs at any rank: Linear, Embedding, MergedLinear (convolutions:
``convolution.py``).

Constructor signatures, parameter names and shapes are those of microsoft/LoRA's ``loralib``; ``r`` is
the maximum rank r_max. At rank b a layer computes (DyLoRA, arXiv 2210.07558, eq. 5 and 7)

    h = W0 x + scale(b) * lora_B[:, :b] @ lora_A[:b] @ x

and with one rank per example, or with any gate (see ``loralib.gate``),

    h_i = W0 x_i + lora_B @ (gate_i * (lora_A @ x_i)).

    x ──────────────> base layer, W0 ───────────> + ──> h
    └──> lora_A ──> z ──> gate * z ──> lora_B ──> ┘
        (r, in)     r numbers, cut at b   (out, r)

``LoRALayer`` holds the state (rank or gate, frozen) and the one forward pass; a layer class adds
how its base runs and how its factors act on an input and on the weight.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_int, is_number
from .components import Components
from .copying import replica_of_base
from .gate import check_rank, check_scaling, rank_gate, scale
from .layout import FIRST, Layout, LayoutError, layout_of
from .merging import Merging
from .recomputation import check_recomputation, in_backward, note_pass
from .state import RankState, set_states
from .walking import named_modules


def only_gradient(value: torch.Tensor) -> torch.Tensor:
    """Zero in the forward pass, the gradient of ``value`` in the backward pass."""
    return value - value.detach()


class LoRALayer(Components, Merging):
    """What all layers share. ``r=0`` makes a plain layer without adapter, as in microsoft/LoRA.

    Args:
        r: maximum rank, 0 or more.
        lora_alpha: alpha of the scaling rule, above 0.
        lora_dropout: dropout probability on the adapter's input.
        scaling: "alpha/b" (the paper), "alpha/r" or "alpha/sqrt(b)".
        merge_weights: accepted for compatibility; merging is explicit here (``merge``, ``unmerge``).

    The defaults of alpha and scaling are microsoft/LoRA's and the paper's; ``inject`` has 2 r and "alpha/r".
    A new layer runs at rank r and computes what its base layer computes, since one factor is zero. A layer made by its
    constructor is its own base layer; ``around`` makes one that holds another module and calls it.
    """

    module_name: str | None = None  # where the layer stands in its model, for error messages
    projections = 1  # MergedLinear: how many of its projections are adapted
    rows = 1  # Conv: rows of lora_A that make one component
    # How many components the ranks 1..r_max of the model take here, where importance spread them (``parts.py``).
    components_at: tuple[int, ...] | None = None
    # Factors of scale(1) .. scale(r), where they were learnt after a training (``strengths.py``).
    strength_at: tuple[float, ...] | None = None

    def __init__(
        self,
        *args,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        scaling: str = "alpha/b",
        merge_weights: bool = True,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.merge_weights = merge_weights
        self.set_up_adapter(r, lora_alpha, lora_dropout, scaling)

    @classmethod
    def around(cls, base: nn.Module, geometry: dict, **adapter):
        """A layer that adapts ``base``: it calls it, and both hold the same parameters.

        ``geometry`` are the attributes that say the layer's shape (``in_features``, ...), ``adapter`` the arguments of
        ``set_up_adapter``.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # The two share the very dictionaries: a parameter that is replaced in one (a move, a merge, FSDP) is so in the
        # other, and since the layer alone is registered in its model, names and state-dict keys stay what they are.
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            layer.__dict__[shared] = base.__dict__[shared]
        layer._modules.update(base._modules)
        layer.__dict__["_base"] = base
        vars(layer).update(geometry)
        layer.merge_weights = True
        layer.set_up_adapter(**adapter)
        return layer.train(base.training)

    def set_up_adapter(
        self,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        scaling: str = "alpha/b",
        in_fp32: bool = False,
    ) -> None:
        """Make lora_A and lora_B on the base weight's device, and freeze the base.

        They have the weight's dtype where that is a float; ``in_fp32``: at least fp32.
        """
        check_int("r", r, 0, math.inf, "give the maximum rank as an int, 1 or more (0: no adapter).")
        check_scaling(scaling, lora_alpha)
        if not is_number(lora_dropout) or not 0 <= lora_dropout <= 1:
            raise ValueError(f"lora_dropout is {lora_dropout!r}; give a probability from 0 to 1.")
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, scaling
        self.lora_dropout = nn.Dropout(float(lora_dropout)) if lora_dropout else nn.Identity()
        self.state = RankState(r)
        self.layout: Layout | str | None = None  # where a batch's examples stand in the input; or why they do not
        if r:
            weight = self.weight
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            dtype = torch.promote_types(dtype, torch.float32) if in_fp32 else dtype
            shape_A, shape_B = self.factor_shapes()
            self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=dtype, device=weight.device))
            self.lora_B = nn.Parameter(torch.empty(shape_B, dtype=dtype, device=weight.device))
            weight.requires_grad = False
            self.reset_adapter()

    @property
    def base_layer(self) -> nn.Module:
        """The module whose output the update is added to: the one the layer was put around, or the layer itself."""
        return self if self._base is None else self._base

    def train(self, mode: bool = True):
        """As every module's; the base layer, which is no child, goes along."""
        if self._base is not None:
            self._base.train(mode)
        return super().train(mode)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # of the torch layer that a subclass derives from
        if hasattr(self, "lora_A"):
            self.strength_at = None
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """lora_A Kaiming-uniform with a = sqrt(5), lora_B = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    # --- what a layer class gives -------------------------------------------------------------------

    def factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lora_A and lora_B."""
        raise NotImplementedError

    def own_base(self, x: torch.Tensor) -> torch.Tensor:
        """W0 x, for a layer that is its own base layer."""
        return super().forward(x)

    def update(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate) -> torch.Tensor:
        """B (gate * (A x)); gate is a float, (components,) or (batch, components)."""
        raise NotImplementedError

    def add_update(self, h: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate) -> torch.Tensor:
        """h plus the update; a layer may do it in fewer steps."""
        return (h + self.update(x, A, B, gate)).to(h.dtype)

    # --- rank ---------------------------------------------------------------------------------------

    def get_dimension(self) -> int:
        """r_max."""
        return self.r

    def get_rank(self):
        """The rank in use: an int, a LongTensor (batch,), or None after ``set_gate`` and after weights of ranks."""
        return self.state.rank

    def set_rank(self, rank, frozen: bool = False) -> None:
        """Run at ``rank``: an int in 0..r, a LongTensor (batch,) with one rank per example, or a float tensor (batch,
        r), each example's weights of the ranks 1..r (see ``loralib.gate``).

        With ``frozen`` (paper, eq. 10) components below b take part but only component b gets a gradient.
        Raises TypeError or ValueError for what is no rank, RuntimeError while the layer is merged.
        """
        rank = check_rank(rank, self.r)
        gate = None
        if isinstance(rank, torch.Tensor) and self.r:
            gate = self.gate_of(rank).to(self.weight.device)
            rank = None if rank.is_floating_point() else rank
        set_states([(self, RankState(rank, gate, bool(frozen)))])

    def set_gate(self, gate: torch.Tensor) -> None:
        """Multiply the components by ``gate``, a float tensor (r,) or (batch, r), scaling included."""
        set_states([(self, self.gate_state(gate))])

    def gate_of(self, ranks: torch.Tensor) -> torch.Tensor:
        """The gate of ranks (batch,) of this layer, or of weights of them: see ``loralib.gate``."""
        return rank_gate(ranks, self.r, self.lora_alpha, self.scaling, self.gate_dtype(), self.strength_at)

    def gate_state(self, gate: torch.Tensor, learn: bool = False) -> RankState:
        """The state in which ``gate`` multiplies the components. Raises TypeError or ValueError for what is no gate."""
        if not isinstance(gate, torch.Tensor) or not gate.is_floating_point():
            raise TypeError(
                f"gate is {type(gate).__name__}; give a float tensor of shape ({self.r},) or (batch, {self.r})."
            )
        if gate.ndim not in (1, 2) or gate.shape[-1] != self.r or not len(gate):
            raise ValueError(f"gate has shape {tuple(gate.shape)}; give ({self.r},) or (batch, {self.r}).")
        return RankState(None, gate.to(self.weight.device, self.gate_dtype()), learn=learn)

    def gate_dtype(self) -> torch.dtype:
        """A gate is never rounded below fp32: its values are strengths, which an int rank applies exactly."""
        return torch.promote_types(self.lora_A.dtype, torch.float32)

    def described(self) -> str:
        """How an error message names the layer."""
        return f"layer {self.module_name!r}" if self.module_name else f"this {type(self).__name__} layer"

    # --- the forward pass ---------------------------------------------------------------------------

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """W0 x, by the base layer."""
        if self._base is None:
            return self.own_base(x)
        return (replica_of_base(self, self._base) if "_is_replica" in self.__dict__ else self._base)(x)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The base layer's output plus the update; called as torch's layers are, ``input=`` included."""
        if self.r == 0 or self.is_merged:
            return self.base(input)
        self.begin(input)
        return self.finish(self.base(input), input)

    def begin(self, x: torch.Tensor) -> None:
        """Raise RuntimeError if this pass recomputes one that ran at another rank."""
        if in_backward():
            check_recomputation(self, (x,) if self.state.is_off else (x, self.lora_A, self.lora_B))

    def finish(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """h, the base layer's output, plus the update of x."""
        if not self.state.is_off:
            h = self._updated(h, x, self.state)
        note_pass(self, h)
        return h

    def _updated(self, h: torch.Tensor, x: torch.Tensor, state: RankState) -> torch.Tensor:
        """h plus the update of x at ``state``."""
        x = self.in_own_dtype(self.lora_dropout(x))
        if state.gate is None:
            return self.add_update(h, x, *self.first_components(state.rank, state.frozen), self.strength())
        gate = self.placed(state.gate.to(device=h.device), x)
        if not state.frozen:
            return self.add_update(h, x, self.lora_A, self.lora_B, gate)
        # The value and the gradient to x come from all components 1..b, the factors' gradient from component b alone.
        value = self.update(x, self.lora_A.detach(), self.lora_B.detach(), gate)
        drawn = torch.arange(1, self.r + 1, device=gate.device) == state.rank.to(gate.device)[:, None]
        gate = self.placed(state.gate.to(device=h.device) * drawn, x)
        drawn_only = only_gradient(self.update(x.detach(), self.lora_A, self.lora_B, gate))
        return h + (value + drawn_only).to(h.dtype)

    def in_own_dtype(self, x: torch.Tensor) -> torch.Tensor:
        """x in the factors' dtype, unless autocast sees to that; what it then gives is added in the output's dtype."""
        if x.dtype == self.lora_A.dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.lora_A.dtype)

    def placed(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gate in use, (components,) or (batch, components), for the rows of x: see ``Layout.spread``."""
        if gate.ndim == 1:
            return gate
        layout = layout_of(self, x.shape, len(gate)) if self.state.learn else FIRST
        if not layout.fits(x.shape, len(gate), None):
            raise LayoutError(
                f"{self.described()} got an input whose first dimension is {x.shape[0]}, but {len(gate)} ranks "
                f"are set; set one rank per example of the batch."
            )
        return layout.spread(gate, x.shape)

    def example_dims(self, x: torch.Tensor) -> int:
        """How many of the first dimensions of an input can hold the examples of a batch."""
        return x.ndim - 1

    def strength(self) -> float:
        """scale(b) at the int rank in use, and what was learnt of it."""
        b = self.state.rank
        own = 1.0 if self.strength_at is None else float(self.strength_at[max(b, 1) - 1])
        return scale(b, self.r, self.lora_alpha, self.scaling) * own

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling!r}"


def gated(z: torch.Tensor, gate) -> torch.Tensor:
    """z (batch, ..., components) times a float, (components,), (batch, components) or, for z (.., batch, ...,
    components), (1, batch, components)."""
    if not isinstance(gate, torch.Tensor):
        return z * gate
    if gate.ndim >= 2:
        gate = gate.view(*gate.shape[:-1], *[1] * (z.ndim - gate.ndim), gate.shape[-1])
    return (z * gate).to(z.dtype)


def adapted_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The layers of a model that have an adapter, with their names, in the model's order; also those inside of PEFT's
    layers (see ``loralib.peft``)."""
    return adapted_among(named_modules(model))


def adapted_among(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, LoRALayer]]:
    """The same of named modules."""
    found = []
    for name, module in modules:
        layer: Any = module if isinstance(module, LoRALayer) else None
        if layer is None and hasattr(type(module), "dylora_layer"):
            layer = module.dylora_layer
        if layer is not None and layer.r:
            found.append((name, layer))
    return found


class Linear(LoRALayer, nn.Linear):
    """``nn.Linear`` with a low-rank update: lora_A (r, in), lora_B (out, r).

    ``fan_in_fan_out`` stores the weight as (in, out), as GPT-2's Conv1D does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        scaling: str = "alpha/b",
        **kwargs,
    ):
        self.fan_in_fan_out = fan_in_fan_out
        super().__init__(
            in_features, out_features, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            scaling=scaling, merge_weights=merge_weights, **kwargs,
        )  # fmt: skip
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def factor_shapes(self):
        return (self.r, self.in_features), (self.out_features, self.r)

    def cut(self, A, B, b):
        return A[:b], B[:, :b]

    def own_base(self, x):
        if not self.fan_in_fan_out:
            return F.linear(x, self.weight, self.bias)
        h = F.linear(x, self.weight.T)
        return h if self.bias is None else h + self.bias

    def update(self, x, A, B, gate):
        return F.linear(gated(F.linear(x, A), gate), B)

    def add_update(self, h, x, A, B, gate):
        # The last product adds to h and scales as it goes, which saves two passes over the output.
        z, strength = F.linear(x, A), gate
        if isinstance(gate, torch.Tensor):
            z, strength = gated(z, gate), 1
        if h.shape[:-1] != z.shape[:-1]:
            h = h.expand(*z.shape[:-1], -1)  # one input, many ranks
        if z.dtype != h.dtype:  # the sum takes the finer of the two
            return (h + F.linear(z if strength == 1 else z * strength, B)).to(h.dtype)
        return torch.addmm(h.reshape(-1, h.shape[-1]), z.reshape(-1, z.shape[-1]), B.T, alpha=strength).view(h.shape)

    def delta(self, A, B, gate):
        delta = (B * gate).to(B.dtype) @ A
        return delta.T if self.fan_in_fan_out else delta

    def new_plain(self):
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)


class MergedLinear(Linear):
    """Several projections in one ``nn.Linear`` (GPT-2's query, key and value), each adapted or not.

    ``enable_lora`` has one bool per projection; the default leaves a plain layer. For G adapted ones lora_A is
    (G*r, in), lora_B (G*out/len(enable_lora), r); component b of projection g is row g*r + b of lora_A.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: tuple[bool, ...] | list[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        scaling: str = "alpha/b",
        **kwargs,
    ):
        self.enable_lora = [bool(enabled) for enabled in enable_lora]
        self.projections = sum(self.enable_lora)
        if not self.enable_lora or out_features % len(self.enable_lora):
            raise ValueError(
                f"enable_lora has {len(self.enable_lora)} entries; give one per projection, a number that divides "
                f"out_features = {out_features}."
            )
        super().__init__(
            in_features, out_features, r=r if self.projections else 0, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            fan_in_fan_out=fan_in_fan_out, merge_weights=merge_weights, scaling=scaling, **kwargs,
        )  # fmt: skip

    def factor_shapes(self):
        out = self.out_features // len(self.enable_lora)
        return (self.projections * self.r, self.in_features), (self.projections * out, self.r)

    def spread(self, adapted: torch.Tensor, dim: int) -> torch.Tensor:
        """Put the adapted projections at their places along ``dim``, zeros at the others."""
        chunks = iter(adapted.chunk(self.projections, dim))
        parts = [next(chunks) if enabled else None for enabled in self.enable_lora]
        zeros = torch.zeros_like(next(part for part in parts if part is not None))
        return torch.cat([zeros if part is None else part for part in parts], dim)

    def update(self, x, A, B, gate):
        B = B.unflatten(0, (self.projections, self.out_features // len(self.enable_lora)))
        z = gated(F.linear(x, A).unflatten(-1, (self.projections, B.shape[-1])), gate)
        h = torch.einsum("...gb,gob->...go", z, B.to(z.dtype))
        return self.spread(h.flatten(-2), -1)

    # Of several projections: the update is no single product, nor a cut a slice.
    add_update = LoRALayer.add_update
    cut = LoRALayer.cut

    def delta(self, A, B, gate):
        A = A.unflatten(0, (self.projections, B.shape[-1]))
        B = B.unflatten(0, (self.projections, self.out_features // len(self.enable_lora)))
        delta = self.spread(((B * gate).to(A.dtype) @ A).flatten(0, 1), 0)
        return delta.T if self.fan_in_fan_out else delta


class Embedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` with a low-rank update: lora_A (r, num_embeddings), lora_B (embedding_dim, r).

    As in microsoft/LoRA lora_A starts at zero and lora_B normal, the other way round than in Linear. Around a scaled
    embedding (Gemma, BART), whose output is ``embed_scale`` times the row, the update is scaled alike, so that it
    remains an update of the weight.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        scaling: str = "alpha/b",
        **kwargs,
    ):
        super().__init__(
            num_embeddings, embedding_dim, r=r, lora_alpha=lora_alpha, scaling=scaling,
            merge_weights=merge_weights, **kwargs,
        )  # fmt: skip

    def set_up_adapter(self, r, *args, **kwargs):
        if r and self.max_norm is not None:
            raise ValueError(
                f"The embedding has max_norm={self.max_norm}, which rescales rows of its weight in every call, and no "
                "update can be merged into such a weight; make it without max_norm."
            )
        super().set_up_adapter(r, *args, **kwargs)

    def factor_shapes(self):
        return (self.r, self.num_embeddings), (self.embedding_dim, self.r)

    def example_dims(self, x):
        return x.ndim

    def reset_adapter(self):
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def update(self, x, A, B, gate):
        h = F.linear(gated(F.embedding(x, A.T, self.padding_idx), gate), B)
        scale = getattr(self.base_layer, "embed_scale", None)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(h.device, self.weight.dtype)  # as Gemma rounds it
        return h if scale is None else h * scale

    def delta(self, A, B, gate):
        return ((B * gate).to(B.dtype) @ A).T

    def new_plain(self):
        options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return nn.Embedding(self.num_embeddings, self.embedding_dim, **{name: getattr(self, name) for name in options})
