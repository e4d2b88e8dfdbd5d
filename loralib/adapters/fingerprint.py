"""Some numbers of a tensor, by which it is known again, in another precision too."""

import torch

from ..sharding import whole
from .keys import factor_in


def fingerprint(tensor: torch.Tensor) -> list[float]:
    """16 of its numbers, evenly spaced, the first and the last among them."""
    places = [i * (tensor.numel() - 1) // 15 for i in range(16)]
    return whole(tensor.detach()).flatten()[places].float().tolist()


def is_known(tensor: torch.Tensor, numbers: list[float], rtol: float = 0.02) -> bool:
    """Whether the numbers are the tensor's, to ``rtol`` (default: what bf16 rounds off, and more)."""
    own, known = (torch.tensor(each, device="cpu") for each in (fingerprint(tensor), numbers))
    return torch.allclose(own, known, rtol=rtol, atol=1e-4)


def of_factors(tensors: dict[str, torch.Tensor]) -> list[float]:
    """That of the last layer's factors in an adapter's file."""
    return fingerprint(_last_factors(tensors))


def are_known(tensors: dict[str, torch.Tensor], numbers: list[float]) -> bool:
    """Whether the numbers are those of ``of_factors``, were the factors rounded to 8 bits."""
    return any(map(factor_in, tensors)) and is_known(_last_factors(tensors), numbers, rtol=0.1)


def _last_factors(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    # A and B: the first hardly moves in a short training, the second is zero before it.
    layers = {key: found[0] for key in sorted(tensors) if (found := factor_in(key))}
    *_, last = layers.values()
    return torch.cat([tensors[key].flatten().float() for key, layer in layers.items() if layer == last])
