"""The benchmark compares what it says, and its check can fail."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.benchmark import __main__ as benchmark
from scripts.benchmark import peers, tables, timing
from scripts.benchmark.rows import Options, Row

SHAPE = peers.Shape("tiny", width=32, layers=2, heads=2)


@pytest.mark.parametrize("make", [peers.ours, peers.overlay, peers.peft, peers.microsoft, peers.lycoris])
def test_every_peer_starts_as_the_stock_model_and_trains_query_and_value(make):
    model = make(SHAPE, 4, "cpu")
    if model is None:
        pytest.skip("this peer is not installed")
    inputs = torch.randint(3, 900, (2, 7))
    torch.testing.assert_close(model.eval()(inputs).logits, peers.stock(SHAPE, "cpu").eval()(inputs).logits)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in peers.stock(SHAPE, "cpu").classifier.parameters())
    assert trained - head == 2 * SHAPE.layers * 4 * 2 * SHAPE.width


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=12), st.floats(0.5, 2))
def test_a_constant_ratio_is_found_whatever_the_noise_of_the_machine(seconds, ratio):
    found = timing.paired_ratio([ratio * s for s in seconds], seconds)
    assert np.allclose([found.median, found.low, found.high], ratio)


def test_every_contender_runs_once_a_round_after_one_warm_up():
    calls = []
    times = timing.alternate({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))


def test_saved_bytes_of_a_known_graph():
    x, w = torch.randn(10, 4), torch.randn(4, 3, requires_grad=True)
    assert (
        timing.saved_bytes(lambda: (x @ w).exp(), [w]) == x.nbytes + 10 * 3 * 4
    )  # x for w's gradient, exp's own output


@pytest.mark.slow
def test_the_command_records_a_table_and_its_check_fails_on_a_worse_ratio(tmp_path, capsys):
    own = ["--quick", "--cases", "checkpoints", "--results", str(tmp_path)]
    assert benchmark.main(own) == 0
    recorded = json.loads((tmp_path / "cpu-quick.json").read_text())
    size = next(row for row in recorded["rows"] if row["case"] == "checkpoint size" and row["peer"] == "whole model")
    assert 0 < size["ratio"] < 0.5 and f"{size['ratio']:.3f}" in (tmp_path / "README.md").read_text()
    for row in recorded["rows"]:
        row["high"] *= (
            100 if row is not size else 0.5
        )  # times may vary in a test; this size is now twice the recorded one
    (tmp_path / "cpu-quick.json").write_text(json.dumps(recorded))
    capsys.readouterr()
    assert benchmark.main([*own, "--check"]) == 1
    assert "whole model" in capsys.readouterr().out.splitlines()[-1]
    size["high"] *= 4
    (tmp_path / "cpu-quick.json").write_text(json.dumps(recorded))
    assert benchmark.main([*own, "--check"]) == 0


def test_another_processors_precision_is_no_regression_but_a_broken_promise_is():
    row = Row("bf16 against fp32", "a shape", "bf16", "fp32", "ms", 7, 10, 0.7, 0.69, 0.71, of_machine=True)
    recorded = [asdict(row) | {"ratio": 0.4, "low": 0.39, "high": 0.41}]
    assert tables.regressions([row], recorded) == []
    assert "promised 0.625" in tables.regressions([replace(row, limit=0.625)], recorded)[0]
    assert "it was 0.400" in tables.regressions([replace(row, of_machine=False)], recorded)[0]


def test_checking_without_a_record_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--quick", "--check", "--results", str(tmp_path)])
    assert "run without --check first" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_this_time_keeps_the_version_of_its_rows(tmp_path, monkeypatch):
    file = tmp_path / "cpu.json"
    for peft, lycoris in (("1.0", "4.1"), ("1.1", tables.MISSING)):
        versions = {"peft": peft, "lycoris-lora": lycoris}
        monkeypatch.setattr(tables, "machine", lambda device, versions=versions: {"versions": dict(versions)})
        tables.record(file, [], None, Options(), [])
    assert tables.read(file)["machine"]["versions"] == {"peft": "1.1", "lycoris-lora": "4.1"}
