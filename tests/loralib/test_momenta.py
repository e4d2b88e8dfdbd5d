"""What optimizers keep goes along with the components, and is read and written whatever it is stored as."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import schedulefree
import torch
from torch import nn
from transformers.optimization import Adafactor

import loralib as lora
from loralib.momenta import kept_for

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Muon": lambda p: torch.optim.Muon(p),
    "torch's Adafactor": lambda p: torch.optim.Adafactor(p),
    "transformers' Adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9),
    "schedule-free AdamW": lambda p: schedulefree.AdamWScheduleFree(p),
    "schedule-free RAdam": lambda p: schedulefree.RAdamScheduleFree(p),
    "schedule-free SGD": lambda p: schedulefree.SGDScheduleFree(p),
    **{
        name: lambda p, name=name, options=options: getattr(bnb.optim, name)(p, lr=1e-3, **options)
        for name, options in [
            ("AdamW8bit", {"min_8bit_size": 1}),
            ("AdamW32bit", {}),
            ("Lion8bit", {"min_8bit_size": 1}),
            ("RMSprop8bit", {"min_8bit_size": 1}),
            ("Adagrad8bit", {"min_8bit_size": 1}),
            ("AdEMAMix8bit", {"min_8bit_size": 1}),
            ("AdEMAMix", {}),
        ]
    },
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


def trained(name: str, lr: float):
    """A model and its optimizer after six steps of rate ``lr``."""
    model = nn.Sequential(lora.Linear(256, 128, r=4, scaling="alpha/r"))
    layer = model[0]
    with torch.no_grad():  # orthogonal rows of one length, and the strongest component last: an ordering only sorts
        layer.lora_A.copy_(nn.init.orthogonal_(torch.empty(4, 256)) * 4)
        layer.lora_B.copy_(nn.init.orthogonal_(torch.empty(128, 4)) * torch.tensor([0.1, 0.2, 0.3, 0.4]))
    optimizer = OPTIMIZERS[name]([layer.lora_A, layer.lora_B])
    for group in optimizer.param_groups:
        group["lr"] = lr
    if hasattr(optimizer, "train"):
        optimizer.train()
    for seed in range(6):  # the fifth is the first that schedule-free RAdam makes
        step(model, optimizer, seed)
    return model, optimizer


def step(model, optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    (model(torch.randn(8, 256)) * torch.randn(8, 128)).sum().backward()
    optimizer.step()


def of_both(name: str, lr: float):
    """That, and a copy of it that was put in order; with them both optimizers."""
    model, optimizer = trained(name, lr)
    other = copy.deepcopy(model)
    own = OPTIMIZERS[name]([other[0].lora_A, other[0].lora_B])
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.order_components(other, own)
    return (model, optimizer), (other, own)


@EVERY_OPTIMIZER
def test_where_ordering_only_sorts_the_next_step_is_the_same(name):
    """Steps without a rate fill the state and move nothing. Optimizers that treat elements, or rows and columns, alike
    then step alike with the components in any order."""
    (model, optimizer), (ordered, own) = of_both(name, lr=0.0)
    start = model[0].delta_weight().detach()
    assert not torch.equal(model[0].lora_B, ordered[0].lora_B)
    torch.testing.assert_close(ordered[0].delta_weight().detach(), start)
    for each, its in ((model, optimizer), (ordered, own)):
        for group in its.param_groups:
            group["lr"] = 1e-3
        step(each, its, 6)
        step(each, its, 7)  # ASGD takes its rate from the step before
    moved, also = (each[0].delta_weight().detach() - start for each in (model, ordered))
    tolerance = 2e-2 if "8bit" in name else 1e-3
    assert float(moved.norm()) > 0
    assert float((moved - also).norm() / moved.norm()) < tolerance


@EVERY_OPTIMIZER
def test_what_is_written_is_read(name):
    model, optimizer = trained(name, lr=1e-3)
    for parameter in model[0].lora_A, model[0].lora_B:
        kept = kept_for(optimizer, parameter)
        assert kept and all(each.follows for each in kept)
        for each in kept:
            value = each.read().clone()
            assert value.shape == parameter.shape and float(value.norm()) > 0
            each.write(value * 2)
            torch.testing.assert_close(each.read(), value * 2, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("schedule-free")])
def test_a_schedule_free_optimizers_second_values_go_along(name):
    """The model that is measured is made of both sets of values."""
    (model, optimizer), (ordered, own) = of_both(name, lr=1e-2)
    x = torch.randn(5, 256)
    optimizer.eval(), own.eval()
    torch.testing.assert_close(ordered(x), model(x), rtol=1e-3, atol=1e-3)


def test_an_unknown_state_stays_and_is_named():
    model, optimizer = trained("SGD", lr=1e-3)
    memory = optimizer.state[model[0].lora_A]["memory"] = torch.randn(4, 256)
    before = memory.clone()
    with pytest.warns(UserWarning, match="SGD keeps memory for the adapter, and of these it is not known"):
        lora.order_components(model, optimizer)
    assert torch.equal(memory, before)
