"""The figure of leaks and utility, as matplotlib would draw it."""

import pytest
from matplotlib.lines import Line2D

from cfgsafe.report import figures

ROW = {
    "model": "m",
    "guidance": None,
    "leaked_per_100": 0.0,
    "leaked_per_100_ci": [0.0, 0.0],
    "utility": 100.0,
}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that would have been written to files."""
    found = []
    monkeypatch.setattr(figures, "save_figure", lambda fig, path: found.append(fig))
    return found


def test_the_legend_shows_bare_markers(tmp_path, drawn):
    rows = [{**ROW, "utility_ci": [90.0, 100.0]}, {**ROW, "model": "n", "utility_ci": [80.0, 100.0]}]
    figures.leaks_and_utility(tmp_path / "f.png", rows, ["m", "n"])
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["m", "n"]
    assert all(isinstance(handle, Line2D) for handle in legend.legend_handles)


def test_error_bars_reach_to_the_ends_of_the_interval():
    row = {"utility": 90.0, "utility_ci": [80.0, 95.0]}
    assert figures.spread(row, "utility") == [[10.0], [5.0]]  # below, above


@pytest.mark.parametrize("low", [0.0, 50.0, 100.0])
def test_markers_at_full_utility_are_drawn_whole(tmp_path, drawn, low):
    figures.leaks_and_utility(tmp_path / "f.png", [{**ROW, "utility_ci": [low, 100.0]}], ["m"])
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom < low and top - bottom >= 10 and (top - 100) / (top - bottom) > 0.04
