"""The site builds strictly; a broken link or reference would fail."""

import os
import shutil
import subprocess
import sys

import pytest

from .pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path):
    """A copy of what the site is made of."""
    for folder in ("docs", "loralib", "results", "scripts", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    shutil.copyfile(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    return tmp_path


def build(tree):
    return subprocess.run(
        ["bash", "scripts/docs.sh"],
        cwd=tree,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_it_builds_and_a_broken_link_or_reference_fails(tree):
    done = build(tree)
    assert done.returncode == 0, done.stderr
    reference = (tree / "site" / "reference" / "python.html").read_text()
    for name in ("inject", "RankSchedule", "DyLoRAMixin", "squeeze_adapter"):
        assert f'id="loralib.{name}"' in reference or f".{name}" in reference
    assert "maximum rank r_max" in reference  # the docstring's words
    explained = (tree / "site" / "explanation" / "nesting.html").read_text()
    assert 'href="../results/study-choosing.html"' in explained  # a link to results/study/choosing.md
    page = tree / "docs" / "index.md"
    text = page.read_text()
    page.write_text(text.replace("tutorials/glue.md", "tutorials/gluu.md"))
    done = build(tree)
    assert done.returncode != 0 and "gluu.md" in done.stderr
    page.write_text(text)
    page = tree / "docs" / "reference" / "python.md"
    page.write_text(page.read_text() + "\n::: loralib.no_such_name\n")
    done = build(tree)
    assert done.returncode != 0 and "no_such_name" in done.stderr
