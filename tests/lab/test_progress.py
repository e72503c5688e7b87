"""Progress: a live bar on a terminal, plain lines elsewhere."""

import io

import plain_study
import pytest
from rich.console import Console

from etude.lab import progress
from etude.lab.engine import CellFailed, CellFinished, CellProgress, Planned
from etude.lab.progress import ProgressDisplay

STUDY = plain_study.study


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def finished(seed, value=0.123456):
    return CellFinished(STUDY, "method", seed, 1.5, ({"arm": "method", "seed": seed, "value": value},))


def test_without_a_terminal_every_cell_is_a_line(clock):
    console = Console(file=io.StringIO(), width=40)
    with ProgressDisplay(console) as display:
        display(Planned(STUDY, 4, 1))
        clock[0] = 10.0
        display(CellProgress(STUDY, "method", 0, 0.5, {"value": 1.0}))
        display(finished(0))
        clock[0] = 3000.0
        display(CellFailed(STUDY, "baseline", 0, "Traceback"))
        display(CellFinished(STUDY, "[red]arm[/red] with a long name", 1, 2.0, ({"text": "a"},)))
    assert console.file.getvalue().splitlines() == [
        "plain: 4 cells, 1 kept from before",
        "[2/4] method, seed 0: value 0.1235 (1.5 s; 20 s left)",
        "[3/4] baseline, seed 0: failed",
        "[4/4] [red]arm[/red] with a long name, seed 1 (2.0 s)",
    ]


@pytest.mark.parametrize(
    ("elapsed", "left"), [(1.0, "9 s left"), (100.0, "15 min left"), (3600.0, "9.0 h left"), (0.0, "0 s left")]
)
def test_time_left_in_a_unit_that_suits_it(clock, elapsed, left):
    console = Console(file=io.StringIO(), width=200)
    with ProgressDisplay(console) as display:
        display(Planned(STUDY, 10, 0))
        clock[0] = elapsed
        display(finished(0))
    assert left in console.file.getvalue()


def test_on_a_terminal_a_bar_shows_cells_metric_and_time_left(clock):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with ProgressDisplay(console) as display:
        display(Planned(STUDY, 4, 1))
        clock[0] = 10.0
        display(CellProgress(STUDY, "method", 0, 0.5, {"value": 0.25}))
        display._bar.refresh()
        assert "plain" in console.file.getvalue()
        assert "method, seed 0: value 0.25" in console.file.getvalue()
        assert "1/4" in console.file.getvalue()
        assert "50 s left" in console.file.getvalue()
        display(finished(0))
        display._bar.refresh()
        assert "2/4" in console.file.getvalue()
        display(CellFailed(STUDY, "baseline", 0, "Traceback"))
        display(Planned(STUDY, 9, 0))  # the next study has a bar of its own
        display._bar.refresh()
        assert len(display._bar.tasks) == 1
    assert "[3/4] baseline, seed 0: failed" in console.file.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, clock):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressDisplay(console) as display:
        display(Planned(STUDY, 1, 0))
        display(finished(0))
    assert "[1/1] method, seed 0" in console.file.getvalue()
