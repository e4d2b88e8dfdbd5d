"""Convolutions with a low-rank update of the weight that runs at any rank."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers import LoRALayer


class Convolution(LoRALayer):
    """What the three convolutions share. With kernel size k in the first dimension a component is k rows of lora_A
    (r*k, in*k); lora_B is (out/groups * K/k, r*k) with K the product of all kernel sizes, so that ``lora_B @ lora_A``
    has as many elements as the weight. In 2-D these are microsoft/LoRA's shapes; its 1-D and 3-D layers fail for k > 1.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        scaling: str = "alpha/b",
        **kwargs,
    ):
        self.rows = kernel_size if isinstance(kernel_size, int) else kernel_size[0]
        super().__init__(
            in_channels, out_channels, kernel_size, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            scaling=scaling, merge_weights=merge_weights, **kwargs,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # microsoft/LoRA's layers hold the convolution as a child: its weight is called conv.weight there.
        for name in ("weight", "bias"):
            if f"{prefix}conv.{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}conv.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def factor_shapes(self):
        k = self.rows
        blocks = math.prod(self.kernel_size) // k
        return (self.r * k, self.in_channels * k), (self.out_channels // self.groups * blocks, self.r * k)

    def example_dims(self, x):
        return 1

    def own_base(self, x):
        return self._conv_forward(x, self.weight, self.bias)

    def delta(self, A, B, gate):
        if isinstance(gate, torch.Tensor):
            gate = gate.repeat_interleave(self.rows, -1)
            if gate.ndim == 2:
                gate = gate[:, None]
        delta = (B * gate).to(B.dtype) @ A
        return delta.view(*delta.shape[:-2], *self.weight.shape)

    def new_plain(self):
        options = ("stride", "padding", "dilation", "groups", "padding_mode")
        kept = {name: getattr(self, name) for name in options}
        plain = getattr(nn, type(self).__name__)
        return plain(self.in_channels, self.out_channels, self.kernel_size, bias=self.bias is not None, **kept)

    def update(self, x, A, B, gate):
        delta = self.delta(A, B, gate).to(x.dtype)
        if not isinstance(gate, torch.Tensor) or gate.ndim == 1:
            return self._conv_forward(x, delta, None)
        # One weight per example: the batch becomes groups of channels of a single grouped convolution.
        batch, padding = len(delta), self.padding
        x = x.expand(batch, *x.shape[1:])
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        h = getattr(F, type(self)._convolve)(
            x.reshape(1, -1, *x.shape[2:]), delta.flatten(0, 1), None, self.stride, padding, self.dilation,
            batch * self.groups,
        )  # fmt: skip
        return h.view(batch, -1, *h.shape[2:])


class Conv1d(Convolution, nn.Conv1d):
    """``nn.Conv1d`` with a low-rank update of its weight; shapes of the factors: see ``Convolution``."""

    _convolve = "conv1d"


class Conv2d(Convolution, nn.Conv2d):
    """``nn.Conv2d`` with a low-rank update of its weight; shapes of the factors: see ``Convolution``."""

    _convolve = "conv2d"


class Conv3d(Convolution, nn.Conv3d):
    """``nn.Conv3d`` with a low-rank update of its weight; shapes of the factors: see ``Convolution``."""

    _convolve = "conv3d"
