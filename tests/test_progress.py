"""Progress: a bar on a terminal; in a log a line every half minute, and none for short work.

The lines are counted by hand from a clock that the test moves.
"""

import sys

import pytest
import tqdm as package

from cfgsafe.progress import progress


class Clock:
    """Seconds that pass only when a test says so; stands in for `time`."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("cfgsafe.progress.time", clock)
    monkeypatch.setattr("tqdm.std.time", clock.time)
    return clock


def test_short_work_leaves_no_trace_in_a_log(clock, capsys):
    with progress(total=100, desc="pairs") as bar:
        for _ in range(100):
            clock.now += 0.29
            bar.update()
    assert list(progress(range(1000))) == list(range(1000))
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    with progress(total=100, desc="pairs") as bar:
        for number in range(70):
            clock.now += 1
            bar.set_postfix({"loss": number}, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines == [
        "pairs: 30 of 100,  1.00it/s, 00:30 so far, 01:10 left, loss=29",
        "pairs: 60 of 100,  1.00it/s, 01:00 so far, 00:40 left, loss=59",
        "pairs: 70 of 100,  1.00it/s, 01:10 so far, 00:30 left, loss=69",
        "",
    ]


def test_the_line_of_the_last_item_is_not_written_twice(clock, capsys):
    for _ in progress(range(2), desc="variants"):
        clock.now += 40
    assert capsys.readouterr().err.count("\n") == 2


def test_what_was_done_before_does_not_count_for_the_rate(clock, capsys):
    with progress(total=100, initial=90, desc="answers") as bar:
        clock.now += 60
        bar.update(5)
    assert "95 of 100, 12.00s/it, 01:00 so far, 01:00 left" in capsys.readouterr().err


def test_nested_work_and_unknown_totals_have_plain_lines(clock, capsys):
    with progress(total=1, desc="outer") as outer:
        for _ in progress(iter([1]), desc="inner"):
            clock.now += 30
        outer.update()
    lines = capsys.readouterr().err.split("\n")
    assert [line.partition(",")[0] for line in lines] == ["inner: 1 of ?", "outer: 1 of 1", ""]


def test_nothing_is_shown_where_another_process_reports(clock, capsys):
    for _ in progress(range(3), disable=True):
        clock.now += 60
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress(range(3), desc="pairs")
    assert type(bar) is package.tqdm and not bar.leave
    assert list(bar) == [0, 1, 2]
    assert "pairs:   0%" in capsys.readouterr().err
