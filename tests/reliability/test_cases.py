"""Every case of the tables: clean refusal, or the right numbers. The short form runs in the suite, all in scripts/soak.sh."""

import os
import shutil

import pytest

from . import cases_adapters, cases_arguments, cases_checkpoints, cases_commands, cases_data, cases_models, world
from .judge import Case, judge

TABLES = {
    "arguments": cases_arguments.CASES,
    "data": cases_data.CASES,
    "models": cases_models.CASES,
    "adapters": cases_adapters.CASES,
    "checkpoints": cases_checkpoints.CASES,
    "commands": cases_commands.CASES,
}
ALL = [(table, case) for table, cases in TABLES.items() for case in cases]
FAST = ("arguments", "data", "commands")  # what is refused there is refused before a model is loaded
CHOSEN = [
    (table, case)
    for table, case in ALL
    if case.quick or (case.refused and table in FAST) or os.environ.get("DYLORA_ALL_CASES")
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(roberta_checkpoint, tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("cases") / "world", roberta_checkpoint)


@pytest.fixture
def folder(built, monkeypatch):
    folder = built.with_name("world")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(built, folder)


def test_there_are_enough():
    names = [(table, case.name) for table, case in ALL]
    assert len(set(names)) == len(names) >= 150


@pytest.mark.parametrize(("table", "case"), CHOSEN, ids=[f"{table}: {case.name}" for table, case in CHOSEN])
def test_a_case(table: str, case: Case, folder, record_property):
    record_property("outcome", judge(case, folder))
