"""Curves: their intervals against the stored predictions, axes that do not zoom into noise, legends beside the data."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loralib.report import plots
from loralib.report.curves import Curve, curves
from loralib.report.results import Choice, RankResults, RankRow

RANKS = (1, 2, 4, 8)


def curve(name="DyLoRA", task="rte", ranks=RANKS, means=(60.0, 61.0, 62.0, 62.5), **more):
    return Curve(task, "validation", name, "accuracy", ranks, means, more.pop("errors", None), 1, name, **more)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    drawn = []

    def keep(self, *_, **__):
        self.canvas = FigureCanvasAgg(self)
        self.canvas.draw()
        drawn.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_one_seed_has_the_interval_of_its_predictions(tmp_path):
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    right = np.stack([draw.random(400) < p for p in (0.6, 0.8)], 1)
    chosen = np.where(right, labels[:, None], 1 - labels[:, None])
    np.savez(tmp_path / "predictions_validation.npz", logits=np.eye(2)[chosen], labels=labels, idx=np.arange(400))
    rows = [RankRow(b, {"accuracy": float(right[:, k].mean())}, 0.5, 400, b) for k, b in enumerate((1, 2))]
    results = RankResults("rte", "m", "accuracy", {"validation": rows}, metrics=("accuracy",), directory=str(tmp_path))
    (found,) = curves([results])
    for k in (0, 1):
        p = right[:, k].mean()
        error = 100 * math.sqrt(p * (1 - p) / 400)
        low, high = found.band[k]
        assert low == pytest.approx(100 * p - 1.96 * error, abs=error / 3)
        assert high == pytest.approx(100 * p + 1.96 * error, abs=error / 3)
    assert found.spread == pytest.approx(100 * math.sqrt(0.24 / 400), rel=0.2)
    again = curves([results, replace(results, seed=1, directory=None)])
    assert again[0].seeds == 2 and again[0].band is None and again[0].errors is not None


def test_a_losss_interval_is_that_of_its_difference_to_the_best(tmp_path):
    draw = np.random.default_rng(0)
    common = draw.exponential(3.0, 200)  # examples differ far more than ranks do
    losses = np.stack([common + 0.2 + 0.05 * draw.standard_normal(200), common], 1)
    np.savez(tmp_path / "predictions_validation.npz", losses=losses, weights=np.ones(200))
    rows = [RankRow(b, {}, float(losses[:, k].mean()), 200, b) for k, b in enumerate((1, 2))]
    results = RankResults("lm", "m", "loss", {"validation": rows}, metrics=("loss",), directory=str(tmp_path))
    (found,) = curves([results])
    assert found.band[1] == pytest.approx((losses[:, 1].mean(),) * 2)
    assert found.band[0][1] - found.band[0][0] == pytest.approx(2 * 1.96 * 0.05 / math.sqrt(200), rel=0.3)


@given(
    st.lists(st.floats(50, 60), min_size=4, max_size=4),
    st.floats(0, 3),
    st.sampled_from(["errors", "band", "samples"]),
)
def test_the_axis_spans_eight_standard_errors_and_all_there_is(means, error, kind):
    more = {"errors": {"errors": (error,) * 4}, "band": {"band": tuple((m - 1.96 * error, m + 1.96 * error) for m in means)},
            "samples": {"samples": 300}}[kind]  # fmt: skip
    drawn = curve(means=tuple(means), **more)
    panel = Figure().subplots()
    plots._scale(panel, [drawn])
    low, high = panel.get_ylim()
    wanted = 50 / math.sqrt(300) if kind == "samples" else error
    assert drawn.spread == pytest.approx(wanted) and high - low >= 8 * wanted
    assert low <= min(means) and max(means) <= high


@pytest.mark.parametrize(("ranks", "scale"), [((1, 2, 4, 8), "log"), ((1, 2, 3, 4), "linear"), ((1, 2), "linear")])
def test_powers_of_two_stand_on_a_log_axis(ranks, scale, figures):
    plots.plot_curves([curve(ranks=ranks, means=tuple(map(float, range(len(ranks)))))], "x.png")
    (panel,) = figures[0].axes
    assert panel.get_xscale() == scale and [int(t) for t in panel.get_xticks()] == list(ranks)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 7])
def test_there_is_no_empty_panel_and_no_legend_over_the_data(tasks, figures):
    many = [curve(f"method number {i} with a long name", f"task {t}") for t in range(tasks) for i in range(9)]
    plots.plot_curves(many, "x.png")
    (figure,) = figures
    assert len(figure.axes) == tasks and all(panel.lines for panel in figure.axes)
    assert not [panel for panel in figure.axes if panel.get_legend()]
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_window_extent()) for panel in figure.axes)
    whole = figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


def test_methods_look_different_and_the_same_in_every_panel(figures):
    names = [f"m{i}" for i in range(14)]
    plots.plot_curves([curve(name, task) for task in ("a", "b") for name in names], "x.png")
    looks = [
        {c.get_label(): (c[0].get_color(), c[0].get_marker(), c[0].get_markerfacecolor(), c[0].get_linestyle())
         for c in panel.containers} for panel in figures[0].axes
    ]  # fmt: skip
    assert looks[0] == looks[1] and len(set(looks[0].values())) == 14
    for one, other in itertools.combinations(list(looks[0].values())[:7], 2):
        assert one[0] != other[0] and one[1] != other[1]  # colour and marker both


def test_the_selected_rank_and_its_rule_are_marked(figures):
    plots.plot_curves(
        [curve(samples=600)], "x.png", Choice(2, "smallest rank within one standard error of the best (rank 8)")
    )
    texts = [text.get_text().replace("\n", " ") for text in figures[0].legends[0].get_texts()]
    assert texts == ["DyLoRA", "rank 2: smallest rank within one standard error of the best (rank 8)"]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_runs_give_the_same_file(kind, tmp_path):
    for name in ("a", "b"):
        plots.plot_curves([curve("$x$ & <b>", errors=(1.0, 2.0, math.nan, 1.0))], tmp_path / f"{name}.{kind}")
    one, other = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "ab")
    assert one == other and len(one) > 1000
