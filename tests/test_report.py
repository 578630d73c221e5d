"""The figure of leaks and utility, as matplotlib would draw it."""

import pytest
from matplotlib.lines import Line2D

from cfgsafe.report import figures
from cfgsafe.report.results import COLUMNS, Column

ROW = {
    "model": "m",
    "guidance": None,
    "echoed_per_100": 0.0,
    "echoed_per_100_ci": [0.0, 1.0],
    "utility": 100.0,
}
ECHO = COLUMNS[:1]


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that would have been written to files."""
    found = []
    monkeypatch.setattr(figures, "save_figure", lambda fig, path: found.append(fig))
    return found


def test_the_legend_shows_bare_markers(tmp_path, drawn):
    rows = [{**ROW, "utility_ci": [90.0, 100.0]}, {**ROW, "model": "n", "utility_ci": [80.0, 100.0]}]
    figures.leaks_and_utility(tmp_path / "f.png", rows, ["m", "n"], ECHO)
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["m", "n"]
    assert all(isinstance(handle, Line2D) for handle in legend.legend_handles)


def test_error_bars_reach_to_the_ends_of_the_interval():
    row = {"utility": 90.0, "utility_ci": [80.0, 95.0]}
    assert figures.spread(row, "utility") == [[10.0], [5.0]]  # below, above


@pytest.mark.parametrize("low", [0.0, 50.0, 100.0])
def test_markers_at_full_utility_are_drawn_whole(tmp_path, drawn, low):
    figures.leaks_and_utility(tmp_path / "f.png", [{**ROW, "utility_ci": [low, 100.0]}], ["m"], ECHO)
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom <= 100 - 5 and 10 <= top - bottom <= 14 and (top - 100) / (top - bottom) > 0.04


def test_the_axis_shows_differences_of_utility(tmp_path, drawn):
    rows = [{**ROW, "utility": value, "utility_ci": [0.0, 100.0]} for value in (70.0, 84.0)]
    figures.leaks_and_utility(tmp_path / "f.png", rows, ["m", "n"], ECHO)
    assert drawn[0].axes[0].get_ylim() == (68.0, 86.0)


def test_each_column_has_its_panel_and_rows_without_a_figure_are_left_out(tmp_path, drawn):
    recall = Column("recall", "recall of x64, %", None, slice="x64")
    known = {"slices": {"x64": {"recall": 40.0, "recall_ci": [30.0, 50.0]}}}
    rows = [{**ROW, "utility_ci": [90.0, 100.0], **known}, {**ROW, "utility_ci": [90.0, 100.0]}]
    figures.leaks_and_utility(tmp_path / "f.png", rows, ["m", "n"], (*ECHO, recall))
    left, right = drawn[0].axes
    assert right.get_xlabel().startswith("recall of x64")
    assert [len(axes.containers) for axes in (left, right)] == [2, 1]
