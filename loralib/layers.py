"""Layers with a low-rank update that runs at any rank: Linear, Embedding, MergedLinear (convolutions: ``convolution.py``).

Constructor signatures, parameter names and shapes are those of microsoft/LoRA's ``loralib``; ``r`` is
the maximum rank r_max. At rank b a layer computes (DyLoRA, arXiv 2210.07558, eq. 5 and 7)

    h = W0 x + scale(b) * lora_B[:, :b] @ lora_A[:b] @ x

and with one rank per example, or with any gate (see ``loralib.gate``),

    h_i = W0 x_i + lora_B @ (gate_i * (lora_A @ x_i)).

``LoRALayer`` holds the state (rank or gate, frozen, merged) and the one forward pass; a layer class adds
how its base runs and how its factors act on an input and on the weight.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .gate import check_rank, check_scaling, rank_gate, scale


def only_gradient(value: torch.Tensor) -> torch.Tensor:
    """Zero in the forward pass, the gradient of ``value`` in the backward pass."""
    return value - value.detach()


class LoRALayer(nn.Module):
    """What all layers share. ``r=0`` makes a plain layer without adapter, as in microsoft/LoRA.

    Args:
        r: maximum rank, 0 or more.
        lora_alpha: alpha of the scaling rule, above 0.
        lora_dropout: dropout probability on the adapter's input.
        scaling: "alpha/b" (the paper), "alpha/r" or "alpha/sqrt(b)".
        merge_weights: accepted for compatibility; merging is explicit here (``merge``, ``unmerge``).

    A new layer runs at rank r and computes what its base layer computes, since one factor is zero.
    """

    base_type = None  # the class that inject replaced
    module_name = None  # where the layer stands in its model; set_rank(model, ...) fills it in for error messages
    projections = 1  # MergedLinear: how many of its projections are adapted
    rows = 1  # Conv: rows of lora_A that make one component

    def __init__(self, *args, r=0, lora_alpha=1, lora_dropout=0.0, scaling="alpha/b", merge_weights=True, **kwargs):
        super().__init__(*args, **kwargs)
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ValueError(f"r is {r!r}; give the maximum rank as an int, 1 or more (0: no adapter).")
        check_scaling(scaling, lora_alpha)
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, scaling
        self.merge_weights = merge_weights
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self._rank, self._gate, self._frozen = r, None, False
        self._drawn = None  # components that took part in a training pass; kept while freeze_undrawn asks for it
        self._base_weight = None  # while merged: [the weight parameter that holds W0]
        if r:
            self.add_adapter()

    def add_adapter(self) -> None:
        """Make lora_A and lora_B beside the base weight (its device and dtype) and freeze the latter."""
        shape_A, shape_B = self.factor_shapes()
        self.lora_A = nn.Parameter(self.weight.new_empty(shape_A))
        self.lora_B = nn.Parameter(self.weight.new_empty(shape_B))
        self.weight.requires_grad = False
        self.reset_adapter()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """lora_A Kaiming-uniform with a = sqrt(5), lora_B = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    # --- what a layer class gives -------------------------------------------------------------------

    def factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of lora_A and lora_B."""
        raise NotImplementedError

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """W0 x, through ``self.weight``."""
        return super().forward(x)

    def update(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate) -> torch.Tensor:
        """B (gate * (A x)); gate is a float, (components,) or (batch, components)."""
        raise NotImplementedError

    def add_update(self, h: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate) -> torch.Tensor:
        """h plus the update; a layer may do it in fewer steps."""
        return h + self.update(x, A, B, gate)

    def delta(self, A: torch.Tensor, B: torch.Tensor, gate) -> torch.Tensor:
        """The change of the weight that ``update`` amounts to, shaped like the weight; gate as a float or (components,)."""
        raise NotImplementedError

    # --- rank ---------------------------------------------------------------------------------------

    def get_dimension(self) -> int:
        """r_max."""
        return self.r

    def get_rank(self):
        """The rank in use: an int, a LongTensor (batch,), or None after ``set_gate`` and after weights of ranks."""
        return self._rank

    def set_rank(self, rank, frozen: bool = False) -> None:
        """Run at ``rank``: an int in 0..r, a LongTensor (batch,) with one rank per example, or a float tensor (batch, r), each
        example's weights of the ranks 1..r (see ``loralib.gate``).

        With ``frozen`` (paper, eq. 10) components below b take part but only component b gets a gradient.
        Raises TypeError or ValueError for what is no rank, RuntimeError while the layer is merged.
        """
        rank = check_rank(rank, self.r)
        gate = None
        if isinstance(rank, torch.Tensor):
            gate = rank_gate(rank.to(self.weight.device), self.r, self.lora_alpha, self.scaling, self.gate_dtype())
            rank = None if rank.is_floating_point() else rank
        self._set_state(rank, gate, frozen)

    def set_gate(self, gate: torch.Tensor) -> None:
        """Multiply the components by ``gate``, a float tensor (r,) or (batch, r), scaling included."""
        if not isinstance(gate, torch.Tensor) or not gate.is_floating_point():
            raise TypeError(
                f"gate is {type(gate).__name__}; give a float tensor of shape ({self.r},) or (batch, {self.r})."
            )
        if gate.ndim not in (1, 2) or gate.shape[-1] != self.r or not len(gate):
            raise ValueError(f"gate has shape {tuple(gate.shape)}; give ({self.r},) or (batch, {self.r}).")
        self._set_state(None, gate.to(self.weight.device, self.gate_dtype()), False)

    def gate_dtype(self) -> torch.dtype:
        """A gate is never rounded below fp32: its values are strengths, which an int rank applies exactly."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _set_state(self, rank, gate, frozen) -> None:
        self.check_unmerged()
        if frozen and rank is None:
            raise ValueError("frozen training updates the component of a drawn rank, and weights of ranks draw none.")
        self._rank, self._gate, self._frozen = rank, gate, bool(frozen)

    def check_unmerged(self) -> None:
        if self._base_weight is not None:
            raise RuntimeError(f"{self._called()} is merged and its rank is fixed; call unmerge() first.")

    def _called(self) -> str:
        return f"layer {self.module_name!r}" if self.module_name else f"this {type(self).__name__} layer"

    # --- the forward pass ---------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)
        if self.r == 0 or self._base_weight is not None or (isinstance(self._rank, int) and self._rank == 0):
            return h
        if self._drawn is not None and self.training and torch.is_grad_enabled():
            self._drawn |= self.drawn_components()
        x = self.lora_dropout(x)
        if self._gate is None:
            return self.add_update(h, x, *self.first_components(self._rank, self._frozen), self.strength())
        gate = self._gate.to(device=h.device)
        if gate.ndim == 2 and x.shape[0] not in (1, len(gate)):
            raise ValueError(
                f"{self._called()} got an input whose first dimension is {x.shape[0]}, but {len(gate)} ranks "
                f"are set; set one rank per example of the batch."
            )
        if not self._frozen:
            return self.add_update(h, x, self.lora_A, self.lora_B, gate)
        # The value and the gradient to x come from all components 1..b, the factors' gradient from component b alone.
        value = self.update(x, self.lora_A.detach(), self.lora_B.detach(), gate)
        own = gate * (torch.arange(1, self.r + 1, device=gate.device) == self._rank.to(gate.device)[:, None])
        return h + value + only_gradient(self.update(x.detach(), self.lora_A, self.lora_B, own))

    def strength(self) -> float:
        """scale(b) at the int rank in use."""
        return scale(self._rank, self.r, self.lora_alpha, self.scaling)

    def split_A(self, A: torch.Tensor) -> torch.Tensor:
        """View lora_A with a dimension for the component: (projections, r, rows, in)."""
        return A.view(self.projections, self.r, self.rows, -1)

    def split_B(self, B: torch.Tensor) -> torch.Tensor:
        """View lora_B with a dimension for the component: (out, r, rows)."""
        return B.view(-1, self.r, self.rows)

    def first_components(self, b: int, frozen: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors cut to rank b; with ``frozen``, all but component b cut off from the gradient."""
        if b == self.r and not frozen:
            return self.lora_A, self.lora_B
        A, B = self.split_A(self.lora_A)[:, :b], self.split_B(self.lora_B)[:, :b]
        if frozen:
            A = torch.cat([A[:, : b - 1].detach(), A[:, b - 1 :]], dim=1)
            B = torch.cat([B[:, : b - 1].detach(), B[:, b - 1 :]], dim=1)
        return A.flatten(0, 2), B.flatten(1, 2)

    def drawn_components(self) -> torch.Tensor:
        """Which components the state in use trains, over all examples: bool (r,)."""
        component = torch.arange(1, self.r + 1, device=self.weight.device)
        if self._rank is None:
            return (self._gate != 0).reshape(-1, self.r).any(0).to(component.device)
        rank = torch.as_tensor(self._rank, device=component.device).reshape(-1, 1)
        return (component == rank if self._frozen else component <= rank).any(0)

    # --- merging ------------------------------------------------------------------------------------

    def delta_weight(self) -> torch.Tensor:
        """What the update at the rank (or gate) in use adds to the weight. Raises ValueError for per-example ranks."""
        if self._gate is None:
            return self.delta(*self.first_components(self._rank), self.strength())
        if self._gate.ndim == 2:
            raise ValueError(f"{self._called()} has one rank per example; set one rank for all before merging.")
        return self.delta(self.lora_A, self.lora_B, self._gate)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update at the rank in use to the weight, for inference.

        The merged weight is a new parameter; the one with W0 is kept aside untouched, with all that shares it (a tied
        output layer, an optimizer), until ``unmerge``.
        """
        if self.r == 0 or self._base_weight is not None:
            return
        merged = self.weight + self.delta_weight().to(self.weight.dtype)
        self._base_weight = [self.weight]
        self.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if self._base_weight is not None:
            (base,) = self._base_weight
            base.data = base.data.to(self.weight.device)
            self.weight, self._base_weight = base, None

    def to_plain(self) -> nn.Module:
        """The plain torch layer that computes what this one computes at the rank in use; it takes over the parameters.

        ``inject`` notes the type it replaced in ``base_type``, so that Hugging Face's Conv1D comes back as such.
        """
        self.merge()
        with torch.device("meta"):
            plain = self.new_plain()
        plain.weight = self.weight
        if getattr(self, "bias", None) is not None:
            plain.bias = self.bias
        return plain.train(self.training)

    def new_plain(self) -> nn.Module:
        """An empty layer of the plain type with this one's shapes and options."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling!r}"


def gated(z: torch.Tensor, gate) -> torch.Tensor:
    """z (batch, ..., components) times a float, (components,) or (batch, components)."""
    if not isinstance(gate, torch.Tensor):
        return z * gate
    if gate.ndim == 2:
        gate = gate.view(gate.shape[0], *[1] * (z.ndim - 2), gate.shape[1])
    return (z * gate).to(z.dtype)


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

    def base(self, x):
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
        h = h.expand(*z.shape[:-1], -1)  # one input, many ranks
        return torch.addmm(h.reshape(-1, h.shape[-1]), z.reshape(-1, z.shape[-1]), B.T, alpha=strength).view(h.shape)

    def delta(self, A, B, gate):
        delta = (B * gate).to(B.dtype) @ A
        return delta.T if self.fan_in_fan_out else delta

    def new_plain(self):
        if self.base_type is not None and self.fan_in_fan_out:
            return self.base_type(self.out_features, self.in_features)
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
        parts = iter(adapted.chunk(self.projections, dim))
        parts = [next(parts) if enabled else None for enabled in self.enable_lora]
        zeros = torch.zeros_like(next(part for part in parts if part is not None))
        return torch.cat([zeros if part is None else part for part in parts], dim)

    def update(self, x, A, B, gate):
        B = B.unflatten(0, (self.projections, self.out_features // len(self.enable_lora)))
        z = gated(F.linear(x, A).unflatten(-1, (self.projections, B.shape[-1])), gate)
        h = torch.einsum("...gb,gob->...go", z, B.to(z.dtype))
        return self.spread(h.flatten(-2), -1)

    add_update = LoRALayer.add_update  # the update is no single product here

    def delta(self, A, B, gate):
        A = A.unflatten(0, (self.projections, B.shape[-1]))
        B = B.unflatten(0, (self.projections, self.out_features // len(self.enable_lora)))
        delta = self.spread(((B * gate).to(A.dtype) @ A).flatten(0, 1), 0)
        return delta.T if self.fan_in_fan_out else delta


class Embedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` with a low-rank update: lora_A (r, num_embeddings), lora_B (embedding_dim, r).

    As in microsoft/LoRA lora_A starts at zero and lora_B normal, the other way round than in Linear.
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

    def factor_shapes(self):
        return (self.r, self.num_embeddings), (self.embedding_dim, self.r)

    def reset_adapter(self):
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def update(self, x, A, B, gate):
        return F.linear(gated(F.embedding(x, A.T, self.padding_idx), gate), B)

    def delta(self, A, B, gate):
        return ((B * gate).to(B.dtype) @ A).T

    def new_plain(self):
        options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        return nn.Embedding(self.num_embeddings, self.embedding_dim, **{name: getattr(self, name) for name in options})
