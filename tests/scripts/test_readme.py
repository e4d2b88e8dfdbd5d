"""What the READMEs point at is in the repository, and their code runs."""

import json
import re
from pathlib import Path

import pytest
import torch

import loralib as lora

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / folder / "README.md" for folder in (".", "examples/NLU", "tests")), *ROOT.glob("results/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


class Attention(torch.nn.Module):
    """As much of a model as the README's code asks for."""

    def __init__(self):
        super().__init__()
        self.query, self.value, self.out = (torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.out(torch.relu(self.query(x)) * self.value(x))


def test_the_code_for_ones_own_model_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (code,) = [block for block in blocks if "RankSchedule" in block]
    x = torch.randn(16, 6)
    names = {
        "model": Attention(), "loss_function": torch.nn.functional.mse_loss,
        "batches": [(x, x.roll(1, -1)) for _ in range(30)],
    }  # fmt: skip
    exec(code, names)
    assert lora.get_rank(names["model"]) == 8
    with lora.use_rank(names["model"], 3):
        assert torch.allclose(names["plain"](x), names["model"](x), atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
