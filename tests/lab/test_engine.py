"""Runs: what is measured, kept, measured anew, and how failures and wrong arguments end."""

import dataclasses

import plain_study
import pytest
import torch

from etude.core.checks import InputError
from etude.lab import judge, run
from etude.lab.cells import configure, plan, run_digest
from etude.lab.engine import CellFailed, CellFinished, Planned
from etude.lab.statistics import Verdict
from etude.lab.store import Store

study = plain_study.study


def table(folder):
    with Store(folder) as store:
        return store.runs()[0].results


def test_a_run_measures_every_cell_once(tmp_path):
    events = []
    outcome = run(study, results=tmp_path, workers=1, listener=events.append)
    assert (outcome.finished, outcome.reused, outcome.failed) == (8, 0, ())
    assert isinstance(events[0], Planned)
    assert sum(isinstance(event, CellFinished) for event in events) == 8
    again = run(study, results=tmp_path, workers=1)
    assert (again.finished, again.reused) == (0, 8)
    results = table(tmp_path)
    assert len(results) == 24
    assert results.by_seed("value", "method", {"point": 2}).keys() == {0, 1, 2, 3}


def test_fresh_measures_anew_and_more_seeds_keep_the_old(tmp_path):
    run(study, results=tmp_path, workers=1, seeds=2)
    assert run(study, results=tmp_path, workers=1, seeds=3).reused == 4
    assert run(study, results=tmp_path, workers=1, seeds=3, fresh=True).finished == 6


@pytest.mark.parametrize("backend", ["loky", "threading", "dask"])
def test_every_backend_gives_the_same_table(tmp_path, backend):
    run(study, results=tmp_path / "one", workers=1)
    outcome = run(study, results=tmp_path / "two", workers=2, backend=backend)
    assert not outcome.failed
    assert table(tmp_path / "one") == table(tmp_path / "two")


def test_a_failing_arm_is_stored_and_the_others_finish(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_STUDY_FAILS", "baseline")
    events = []
    outcome = run(study, results=tmp_path, workers=1, listener=events.append)
    assert outcome.finished == 4
    assert {failure.arm for failure in outcome.failed} == {"baseline"}
    assert "RuntimeError: <b>the arm failed" in outcome.failed[0].traceback
    assert sum(isinstance(event, CellFailed) for event in events) == 4
    with Store(tmp_path) as store:
        assert len(store.runs()[0].failures) == 4
    monkeypatch.delenv("PLAIN_STUDY_FAILS")
    retried = run(study, results=tmp_path, workers=1)
    assert (retried.finished, retried.reused) == (4, 4)
    with Store(tmp_path) as store:
        assert store.runs()[0].failures == ()


def test_the_global_generators_and_threads_are_put_back(tmp_path):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(study, results=tmp_path, workers=1, seeds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_what_determines_a_cell_is_in_its_digest():
    config = configure(study, "small")
    digests = {
        run_digest(study, config, "cpu"),
        run_digest(study, dataclasses.replace(config, points=4), "cpu"),
        run_digest(study, config, "cuda"),
        run_digest(dataclasses.replace(study, method="etude.core.sites"), config, "cpu"),
        run_digest(dataclasses.replace(study, slug="other"), config, "cpu"),
    }
    assert len(digests) == 5
    cells = plan(study, config, (0, 1), "cpu")
    assert len({cell.digest for cell in cells}) == 4
    assert [(cell.arm, cell.seed) for cell in cells[:2]] == [("method", 0), ("method", 1)]


def test_comments_and_docstrings_do_not_change_the_digest(tmp_path, monkeypatch):
    from etude.lab import cells

    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("x = 1\n", '"""Says."""\n\nx = 1  # why\n', "x = 2\n"):
        (tmp_path / "some_method.py").write_text(text)
        cells._source_digest.cache_clear()
        found.append(cells._source_digest("some_method"))
    assert found[0] == found[1] != found[2]


def test_settings_are_read_as_their_fields_types():
    config = configure(study, "small", {"points": "7", "sizes": "3, 4", "pause": "0.5", "fast": "true", "name": "a"})
    assert config == plain_study.Config(7, 0.5, (3, 4), "a", True)
    assert configure(study, "small", {"name": "none"}).name is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"point": "3"}, "did you mean 'points'"),
        ({"points": "three"}, "--set points: got 'three'; give a value of type int"),
        ({"fast": "maybe"}, "type bool"),
    ],
)
def test_unusable_settings(settings, message):
    with pytest.raises(InputError, match=message):
        configure(study, "small", settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "smal"}, "did you mean 'small'"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"seeds": [-1]}, "distinct"),
        ({"backend": "lok"}, "did you mean 'loky'"),
        ({"device": "gpu9"}, "device"),
        ({"workers": 0}, "workers"),
        ({"tracker": "tensorbord"}, "did you mean 'tensorboard'"),
    ],
)
def test_unusable_arguments_measure_nothing(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run(study, results=tmp_path / "new", **arguments)
    assert not (tmp_path / "new" / "etude.sqlite").exists()


def test_a_record_of_anything_but_plain_values_fails_its_cell(tmp_path):
    broken = dataclasses.replace(study, measure=lambda *_: {"value": [1, 2]}, origin="plain_study")
    outcome = run(broken, results=tmp_path, workers=1, seeds=1)
    assert "record entry 'value'" in outcome.failed[0].traceback


def test_verdicts_come_with_small_and_not_with_smoke(tmp_path):
    run(study, results=tmp_path, workers=1)
    with Store(tmp_path) as store:
        stored = store.runs()[0]
    first, second = judge(study, stored)
    assert first.finding.verdict is Verdict.REPRODUCED
    assert second.finding.verdict is Verdict.NOT_REPRODUCED
    assert all(j.finding.verdict is Verdict.INCONCLUSIVE for j in judge(study, stored, "smoke"))


def test_an_interrupt_keeps_finished_cells(tmp_path):
    def interrupt(event):
        if isinstance(event, CellFinished):
            raise KeyboardInterrupt

    outcome = run(study, results=tmp_path, workers=1, listener=interrupt)
    assert outcome.interrupted
    assert run(study, results=tmp_path, workers=1).reused == 1
