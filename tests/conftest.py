"""Shared fixtures. Nothing here needs a network or the real GLUE data."""

import gc
from pathlib import Path

import pytest
import torch

from . import tiny

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    """Files that hold slow tests come first, so that processes end together (test.sh: --no-loadscope-reorder)."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def imports_left_alone():
    """The garbage collector leaves alone what is imported by now: Trainer runs it three times a training, and each time
    it would go through all of torch's and transformers' objects, as long as a tiny training takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def microsoft():
    """microsoft/LoRA's loralib 0.1.2 under another name; scripts/test.sh installs it beside."""
    from scripts.benchmark.peers import microsoft_module

    module = microsoft_module()
    if module is None:
        pytest.skip("microsoft's loralib is not in the environment's peers folder; scripts/test.sh puts it there")
    return module


@pytest.fixture(scope="session")
def roberta_config():
    """A RoBERTa of a few thousand parameters."""
    return tiny.config()


@pytest.fixture(scope="session")
def roberta_checkpoint(tmp_path_factory):
    """A directory with that model (an encoder with random weights, as hub checkpoints have) and a word tokenizer."""
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory):
    """A directory with a language model of a few thousand parameters and a word tokenizer."""
    return tiny.llama_checkpoint(tmp_path_factory.mktemp("tiny-llama"))
