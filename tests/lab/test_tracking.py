"""Trackers: every value a cell records and reports reaches them, and one that breaks does not end a run."""

import dataclasses
import threading

import plain_study
import pytest

from etude.core.checks import InputError
from etude.lab import run

tracking = pytest.importorskip("accelerate.tracking")
study = plain_study.study


@pytest.fixture
def logged(monkeypatch):
    """What a tracker in place of Accelerate's TensorBoard was given."""
    found = {"steps": [], "values": [], "config": None, "started": 0, "finished": 0, "folder": None, "threads": set()}

    class Tracker:
        requires_logging_directory = True

        def __init__(self, name, logging_dir):
            found["folder"] = logging_dir

        def start(self):
            found["started"] += 1

        def store_init_configuration(self, values):
            found["config"] = values

        def log(self, values, step):
            found["values"].append(values)
            found["steps"].append(step)
            found["threads"].add(threading.current_thread().name)

        def finish(self):
            found["finished"] += 1

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    found["class"] = Tracker
    return found


def test_every_record_and_progress_is_logged(tmp_path, logged):
    run(study, results=tmp_path, workers=1, seeds=1, tracker="tensorboard", settings={"pause": 0.4})
    assert (logged["started"], logged["finished"]) == (1, 1)
    assert logged["folder"] == str(tmp_path / "tracker")
    assert logged["config"] == {"points": 3, "pause": 0.4, "sizes": "(1, 2)", "name": "None", "fast": False}
    names = {name for values in logged["values"] for name in values}
    assert {"method/seed 0/value", "baseline/seed 0/point", "method/seed 0/progress/value"} <= names
    assert not [name for name in names if "text" in name or name.endswith("seed")]
    assert logged["steps"] == sorted(set(logged["steps"]))
    lasting = [values["method/seed 0/value"] for values in logged["values"] if "method/seed 0/value" in values]
    assert len(lasting) == 3


def test_names_are_those_that_every_tracker_takes(tmp_path, logged):
    named = dataclasses.replace(
        study,
        arms=("ticket (0.5 σ)",),
        claims=(),
        measure=lambda *_: {"error, %": 1.0},
        origin="plain_study",
    )
    run(named, results=tmp_path, workers=1, seeds=1, tracker="tensorboard")
    assert [list(values) for values in logged["values"]] == [["ticket _0.5 __/seed 0/error_ _"]]


def test_one_that_breaks_is_given_up_and_the_run_goes_on(tmp_path, logged):
    def log(self, values, step):
        raise ConnectionError("gone")

    logged["class"].log = log
    with pytest.warns(UserWarning, match=r"tensorboard takes no more values \(ConnectionError: gone\)"):
        outcome = run(study, results=tmp_path, workers=1, seeds=2, tracker="tensorboard")
    assert (outcome.finished, outcome.failed) == (4, ())
    assert logged["finished"] == 1


def test_one_that_cannot_start_is_refused_before_anything_is_measured(tmp_path, logged):
    def start(self):
        raise RuntimeError("log in first")

    logged["class"].start = start
    events = []
    with pytest.raises(InputError, match=r"'tensorboard' cannot be started \(RuntimeError: log in first\)"):
        run(study, results=tmp_path, workers=1, tracker="tensorboard", listener=events.append)
    assert len(events) == 1


def test_one_that_is_not_installed_says_what_to_install(tmp_path, logged):
    with pytest.raises(InputError, match="'wandb' is not installed; pip install wandb"):
        run(study, results=tmp_path, tracker="wandb")
    assert not list(tmp_path.iterdir())
