"""Every case of the tables: clean refusal, or the right numbers. The short form runs in the suite, all in scripts/soak.sh."""

import os
import shutil

import pytest

from . import cases_arguments, cases_data, world
from .judge import Case, judge

TABLES = {"arguments": cases_arguments.CASES, "data": cases_data.CASES}
ALL = [(table, case) for table, cases in TABLES.items() for case in cases]
CHOSEN = [pair for pair in ALL if pair[1].quick or os.environ.get("DYLORA_ALL_CASES")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(roberta_checkpoint, tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"), roberta_checkpoint)


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "world" / "cache")
    return shutil.copytree(built, tmp_path / "world")


def test_there_are_enough():
    names = [(table, case.name) for table, case in ALL]
    assert len(set(names)) == len(names) >= 150


@pytest.mark.parametrize(("table", "case"), CHOSEN, ids=[f"{table}: {case.name}" for table, case in CHOSEN])
def test_a_case(table: str, case: Case, folder):
    judge(case, folder)
