"""What the trainer needs of the installed transformers: an upgrade that moves it fails here, with its name."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from transformers import Trainer

import loralib.training
from loralib.training.loading import LOADER_SETTINGS
from loralib.training.trainer import PRIVATE, DyLoRAMixin

FILES = sorted(Path(loralib.training.__file__).parent.glob("*.py"))
SIGNATURES = {
    "_get_train_sampler": "(self, train_dataset=None)",
    "_get_eval_sampler": "(self, eval_dataset)",
    "_get_dataloader": "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None)",
    "_prepare_inputs": "(self, inputs)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_best_model": "(self)",
    # public, and overridden with these arguments
    "evaluation_loop": "(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval')",
    "prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys=None)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
    "get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "get_train_dataloader": "(self)",
    "call_model_init": "(self, trial=None)",
}


def bare(function):
    """The signature without annotations."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_installed_trainer_has_it_with_these_arguments(name):
    assert hasattr(Trainer, name), f"transformers' Trainer has no {name} any more"
    assert bare(getattr(Trainer, name)) == SIGNATURES[name]


def test_everything_private_is_listed_and_there():
    source = inspect.getsource(inspect.getmodule(Trainer))
    for name in PRIVATE:
        assert f"self.{name}" in source or f"def {name}(" in source, f"transformers' Trainer has no {name} any more"
    own = {name for cls in DyLoRAMixin.__mro__[:-1] for name in vars(cls)}
    used = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            is_super = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call)
            if (is_self or is_super) and node.attr.startswith("_") and not node.attr.startswith("__"):
                used.add(node.attr)
    of_trainer = {name for name in own | used if hasattr(Trainer, name) or re.search(rf"self\.{name}\b", source)}
    assert {name for name in of_trainer if name.startswith("_") and not name.startswith("__")} == set(PRIVATE)


def test_the_public_attributes_are_there():
    source = inspect.getsource(inspect.getmodule(Trainer))
    for name in (
        "model_accepts_loss_kwargs", "loss_is_scaled_for_ga", "compute_loss_func", "compute_metrics", "model_wrapped",
        "is_deepspeed_enabled", "is_fsdp_enabled", "accelerator", "processing_class", "hub_model_id",
    ):  # fmt: skip
        assert f"self.{name}" in source, f"transformers' Trainer has no {name} any more"


def test_a_loader_has_the_settings_that_are_carried_over():
    loader = DataLoader([1])
    assert all(hasattr(loader, name) for name in LOADER_SETTINGS)


def test_torch_tells_whether_a_backward_pass_runs():
    import torch

    assert torch._C._current_graph_task_id() == -1
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(torch._C._current_graph_task_id()))
    x.sum().backward()
    assert seen[0] != -1
