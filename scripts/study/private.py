"""What a rank may have for itself once the training is over: a head refitted to its features.

It leaves the adapter's components to all ranks, as ``loralib.fit_strengths`` does.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

import loralib as lora

from .methods import SHOWN

STRENGTHS = [0.001, 0.01, 0.1, 1.0]  # of the head's regularisation, as scikit-learn counts: the inverse
Autocast = Callable[[], AbstractContextManager]


def with_heads(model: nn.Module, batches: Iterable[dict], autocast: Autocast) -> Iterator[int]:
    """Yield each rank with the last layer of the classifier refitted to that rank's features; afterwards it is whole.

    Logistic regression on what goes into that layer, how regularised chosen by three folds of the training data.
    """
    last = model.classifier.out_proj
    whole = {name: parameter.detach().clone() for name, parameter in last.named_parameters()}
    features, labels = features_of(model, last, batches, autocast)
    for b in SHOWN:
        weight, bias = refitted(features[b], labels)
        with torch.no_grad():
            last.weight.copy_(weight)
            last.bias.copy_(bias)
        yield b
    last.load_state_dict(whole)


@torch.no_grad()
def features_of(
    model: nn.Module, last: nn.Module, batches: Iterable[dict], autocast: Autocast
) -> tuple[dict, torch.Tensor]:
    """What goes into ``last`` at each rank, {rank: (examples, in)}, and the examples' labels."""
    seen, labels = {b: [] for b in SHOWN}, []
    taken: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, args: taken.append(args[0].float().cpu()))

    def run(inputs: dict) -> torch.Tensor:
        model(**inputs)
        return taken.pop()

    model.eval()
    for batch in batches:
        labels.append(batch["labels"].cpu())
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with autocast():
            for b, features in lora.at_ranks(model, inputs, SHOWN, run):
                seen[b].append(features)
    hook.remove()
    return {b: torch.cat(parts) for b, parts in seen.items()}, torch.cat(labels)


def refitted(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (labels, in) and bias (labels,) of a linear layer whose softmax is the logistic regression."""
    from sklearn.linear_model import LogisticRegressionCV

    fitted = LogisticRegressionCV(
        Cs=STRENGTHS, cv=3, max_iter=500, scoring="neg_log_loss", l1_ratios=(0,), use_legacy_attributes=False
    )
    fitted.fit(features.numpy(), labels.numpy())
    weight, bias = torch.tensor(fitted.coef_), torch.tensor(fitted.intercept_)
    if len(weight) == 1:  # of two labels: the second's, beside nothing
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias
