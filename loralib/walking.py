"""The modules of a model, as each training step asks for them."""

from torch import nn


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``list(model.named_modules())``, without the chain of generators that hands each one up through all levels."""
    found, seen = [("", model)], {model}

    def visit(parent: nn.Module, prefix: str) -> None:
        for key, child in parent._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                found.append((prefix + key, child))
                if child._modules:
                    visit(child, f"{prefix}{key}.")

    visit(model, "")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's, DataParallel's and DistributedDataParallel's."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Every module with its mode; an adapted layer's base layer, which is no child, too."""
    modules = [module for _, module in named_modules(model)]
    bases = [base for module in modules if (base := module.__dict__.get("_base")) is not None]
    return [(module, module.training) for module in [*modules, *bases]]


def put_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Put back what ``modes_of`` found."""
    for module, training in modes:
        module.training = training
