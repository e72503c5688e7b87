"""What a measurement is lent: artifacts made once and read by all, progress that cannot fail."""

import json
import threading

import pytest
import torch

from etude.core.checks import InputError
from etude.lab.context import CellContext
from etude.lab.study import Context


@pytest.fixture
def context(tmp_path):
    (tmp_path / "beats").mkdir()
    return CellContext(torch.device("cpu"), tmp_path, tmp_path / "artifacts", tmp_path / "beats" / "cell.json")


def test_it_is_the_context_of_the_protocol(context):
    assert isinstance(context, Context)


def test_an_artifact_is_made_once_and_read_back(context):
    made = []

    def make():
        made.append(1)
        return {"w": torch.arange(6.0, requires_grad=True).view(2, 3).t()}

    first, second = context.artifact("start", make), context.artifact("start", make)
    assert len(made) == 1
    assert torch.equal(first["w"], torch.arange(6.0).view(2, 3).t())
    assert torch.equal(first["w"], second["w"])
    assert not first["w"].requires_grad


def test_two_arms_that_ask_at_once_make_it_once(context):
    made, begun = [], threading.Barrier(2)

    def make():
        made.append(1)
        return {"w": torch.zeros(1)}

    def ask():
        begun.wait()
        context.artifact("shared", make)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_damaged_artifact_is_made_anew(context, tmp_path):
    context.artifact("start", lambda: {"w": torch.ones(2)})
    path = tmp_path / "artifacts" / "start.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    assert context.artifact("start", lambda: {"w": torch.ones(2)})["w"].tolist() == [1.0, 1.0]


def test_one_that_cannot_be_made_leaves_nothing(context, tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        context.artifact("start", fail)
    with pytest.raises(AttributeError):
        context.artifact("start", lambda: {"w": "text"})
    assert not [path for path in (tmp_path / "artifacts").iterdir() if path.suffix != ".lock"]


def test_a_write_that_fails_leaves_no_part_behind(context, tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("etude.lab.context.save_file", full)
    with pytest.raises(OSError, match="No space"):
        context.artifact("start", lambda: {"w": torch.ones(1)})
    assert not [path for path in (tmp_path / "artifacts").iterdir() if path.suffix != ".lock"]


def test_one_that_vanishes_is_an_error(context, monkeypatch):
    monkeypatch.setattr("etude.lab.context.save_file", lambda tensors, path: None)
    with pytest.raises(OSError, match="cannot be read back"):
        context.artifact("start", lambda: {"w": torch.ones(1)})


@pytest.mark.parametrize("name", ["", "a/b", "../up", "/tmp/x"])
def test_a_name_that_leads_elsewhere_is_refused(context, name):
    with pytest.raises(InputError, match="artifact"):
        context.artifact(name, dict)


def test_progress_is_written_at_most_twice_a_second_and_never_fails(context, tmp_path):
    beat = tmp_path / "beats" / "cell.json"
    context.progress(0.25, loss=0.5)
    assert json.loads(beat.read_text()) == {"fraction": 0.25, "metrics": {"loss": 0.5}}
    context.progress(0.5, loss=0.1)
    assert json.loads(beat.read_text())["fraction"] == 0.25
    beat.unlink()
    beat.parent.rmdir()
    context._last_beat = 0.0
    context.progress(0.75)
