"""A trained LoRA of rank r_max made smaller: by rank in every layer, or by components over all layers."""

from collections.abc import Callable, Iterable

import torch

import loralib as lora
from loralib.layers import LoRALayer
from loralib.model import lora_layers

LOOKED_AT = 1024  # training examples from which importance is measured


def as_trained(model) -> Callable[[], None]:
    """What puts the factors back as they are now, and ranks of which no strengths were learnt."""
    layers = [layer for _, layer in lora_layers(model)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    values = [factor.detach().clone() for factor in factors]

    def restore() -> None:
        for factor, value in zip(factors, values, strict=True):
            factor.data.copy_(value)
        for layer in layers:
            layer.strength_at = None

    return restore


def cut(model, name: str) -> None:
    """Change the trained lora-8 in place, so that its ranks are what the way ``name`` of cutting gives."""
    for _, layer in lora_layers(model):
        layer.scaling = "alpha/b" if name == "cut-alpha/b" else "alpha/r"
    if name not in ("cut-alpha/b", "cut-alpha/r"):
        # Per layer by SVD: its first b components are then what PEFT's convert_to_lora keeps at rank b.
        lora.order_components(model)


def importance(model, batches: Iterable[dict]) -> dict[LoRALayer, torch.Tensor]:
    """``loralib.component_importance`` on the examples of the batches: {layer: (r,)}."""
    examples = (
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    )
    found = lora.component_importance(model, examples)
    return {layer: found[name] for name, layer in lora_layers(model)}


def singular_values(model) -> dict[LoRALayer, torch.Tensor]:
    """Of every layer's update, whose components must be singular pairs: {layer: (r,)}."""
    return {
        layer: layer.strength() * layer.lora_A.detach().norm(dim=1) * layer.lora_B.detach().norm(dim=0)
        for _, layer in lora_layers(model)
    }


@torch.no_grad()
def whitened(model, batches: Iterable[dict]) -> dict[LoRALayer, torch.Tensor]:
    """Rewrite the components of every layer so that the first b lose the least of its output on the batches; of each
    component the root of its mean squared output: {layer: (r,)}.

    With C = E[x x^T] of the layer's input, tokens alone, and B A C^(1/2) = U S V^T the factors are U S and
    V^T C^(-1/2).
    """
    found: dict[LoRALayer, torch.Tensor] = {}
    for layer, moment in second_moments(model, batches).items():
        sizes, axes = torch.linalg.eigh(moment)
        sizes = sizes.clamp(min=1e-9 * float(sizes[-1])).sqrt()
        root, back = (axes * sizes @ axes.T, axes / sizes @ axes.T)
        U, S, Vt = torch.linalg.svd(layer.lora_B.double().cpu() @ (layer.lora_A.double().cpu() @ root))
        layer.lora_B.copy_(U[:, : layer.r] * S[: layer.r])
        layer.lora_A.copy_(Vt[: layer.r] @ back)
        found[layer] = layer.strength() * S[: layer.r]
    return found


def second_moments(model, batches: Iterable[dict]) -> dict[LoRALayer, torch.Tensor]:
    """E[x x^T] of what each layer gets for the tokens of the batches, padding left out."""
    total: dict[LoRALayer, torch.Tensor] = {}
    tokens, mask = 0, torch.empty(0)

    def add(layer, args) -> None:
        x = args[0][mask].double().cpu()
        total[layer] = total.get(layer, 0) + x.T @ x

    hooks = [layer.register_forward_pre_hook(add) for _, layer in lora_layers(model)]
    model.eval()
    for batch in batches:
        mask = batch["attention_mask"].bool()
        tokens += int(mask.sum())
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {layer: moment / tokens for layer, moment in total.items()}


def highest(scores: dict[LoRALayer, torch.Tensor], b: int) -> dict[LoRALayer, torch.Tensor]:
    """Which components to keep so that as many are left as at rank b, for layers of one size: {layer: bool (r,)}."""
    flat = torch.cat(list(scores.values()))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(b * len(scores)).indices] = True
    return dict(zip(scores, chosen.split([len(each) for each in scores.values()]), strict=True))


def of_one_share(values: dict[LoRALayer, torch.Tensor], b: int) -> dict[LoRALayer, torch.Tensor]:
    """The first components of each layer, as few as reach a share t of its squared singular values, with the largest t
    that leaves no more than at rank b; at least one a layer, as in PEFT."""
    squares = {layer: each.cpu().square() for layer, each in values.items()}
    shares = {layer: (each.cumsum(0) / each.sum()).double() for layer, each in squares.items()}

    def kept(t: float) -> dict[LoRALayer, torch.Tensor]:
        return {layer: torch.arange(len(each)) <= (each < t).sum() for layer, each in shares.items()}

    fits = [
        t
        for t in torch.cat(list(shares.values())).tolist()
        if sum(map(int, map(torch.sum, kept(t).values()))) <= b * len(values)
    ]
    return kept(max(fits, default=0.0))


def to_keep(model, by: str, levels: Iterable[int], batches: Iterable[dict]) -> dict[int, dict[LoRALayer, torch.Tensor]]:
    """{level b: which components of each layer to keep}; ``by`` as in ``methods.Cut``."""
    if by in ("importance", "whitened"):
        scores = importance(model, batches) if by == "importance" else whitened(model, batches)
        return {b: highest(scores, b) for b in levels}
    choose = {"values": highest, "energy": of_one_share}[by]
    return {b: choose(singular_values(model), b) for b in levels}


def with_components(model, kept: dict[int, dict[LoRALayer, torch.Tensor]]):
    """Yield each level with the model reduced to the components that it keeps; afterwards it is whole again."""
    whole = {layer: layer.lora_B.detach().clone() for _, layer in lora_layers(model)}
    for b, chosen in kept.items():
        for layer, value in whole.items():
            layer.lora_B.data.copy_(value * chosen[layer].to(value.device))
        yield b
    for layer, value in whole.items():
        layer.lora_B.data.copy_(value)
