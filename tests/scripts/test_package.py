"""A wheel from the tree, in an environment with nothing but the base dependencies, outside the repository."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def closure(requirements):
    """The names of the distributions that these bring, without extras."""
    found, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # torch's CUDA parts, which its CPU build does not bring
        found.add(requirement.name)
        waiting += [Requirement(text) for text in needs]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel and its base dependencies alone."""
    folder = tmp_path_factory.mktemp("package")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name.startswith(("loralib/", "examples/NLU/src/")) or "/" not in name:
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "tree" / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "tree")]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    base = [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    for name in closure(base):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if not file.parts[0].startswith("..")}:
            source = Path(distribution.locate_file(top)).resolve()
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "venv" / "bin" / "python"


def run(python, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(python), *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


TRAINING = """
import torch
import loralib as lora

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
lora.inject(model, ["0"], r=4, modules_to_save=["2"])
lora.mark_only_lora_as_trainable(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
x = torch.randn(64, 8)
y = (x[:, 0] > 0).long()
bound = lora.RankSchedule().resolve(4, "alpha/r", steps=40)
for step in range(40):
    bound.setting(step, len(x)).apply(model, optimizer)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora.set_rank(model, 2)
wanted = model.eval()(x)
assert loss < 0.4, loss
lora.save_adapter(model, "adapter", extra={"task": "toy"})
lora.load_adapter(model, "adapter")
assert torch.equal(model(x), wanted)
print(lora.__file__)
"""


def test_it_trains_saves_loads_and_exports(python, tmp_path):
    done = run(python, "-c", TRAINING, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(ROOT) not in done.stdout
    done = run(python, "-m", "loralib.cli", "export", "adapter", "--rank", "2", "--to", "small", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "README.md").exists()
    again = "import torch, loralib as lora; m = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)); "
    done = run(python, "-c", again + "lora.load_adapter(m, 'small', head='fresh')", cwd=tmp_path)
    assert "other base weights" in done.stderr  # a fresh model is not the one that was trained


@pytest.fixture(scope="module")
def trained(python, tmp_path_factory):
    """A directory with an adapter, a, and a run's table."""
    directory = tmp_path_factory.mktemp("trained")
    done = run(python, "-c", TRAINING.replace('"adapter"', '"a"'), cwd=directory)
    assert done.returncode == 0, done.stderr
    (directory / "run").mkdir()
    shutil.copyfile(ROOT / "results/cola/rank_results.json", directory / "run/rank_results.json")
    return directory


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("from loralib.trainer import DyLoRATrainer", "transformers is not installed; run: pip install 'dylora[train]'"),
        ("from loralib.cli import main; main(['inspect', 'a'])", "rich is not installed; run: pip install 'dylora[report]'"),
        ("from loralib.cli import main; main(['report', 'run'])", "is not installed; run: pip install 'dylora[report]'"),
        ("from loralib.cli import main; main(['select', 'run'])", "is not installed; run: pip install 'dylora[report]'"),
        ("from loralib.cli import main; main(['merge', 'a', '--rank', '1', '--to', 'm'])",
         "transformers is not installed; run: pip install 'dylora[train]'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_the_smallest_extra(code, sentence, python, trained):
    done = run(python, "-c", code, cwd=trained)
    assert sentence in done.stderr


def test_the_description_leads_nowhere_outside_of_the_repository(python):
    (file,) = python.parents[1].glob("lib/python*/site-packages/dylora-*.dist-info/METADATA")
    text = file.read_text(encoding="utf-8")
    Metadata.from_email(text, validate=True)  # as an index would
    assert "Description-Content-Type: text/markdown" in text and "Train one LoRA adapter" in text
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", text) and "](https://arxiv.org/abs/2210.07558)" in text


def test_a_choice_by_a_margin_needs_no_extra(python, tmp_path):
    shutil.copyfile(ROOT / "results/cola/rank_results.json", tmp_path / "rank_results.json")
    done = run(python, "-m", "loralib.cli", "select", ".", "--within", "3", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("rank "), done.stderr
