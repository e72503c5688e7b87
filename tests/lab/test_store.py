"""The results folder under every mishap: each has a clear outcome and loses no finished cell."""

import os
import sqlite3
import subprocess

import plain_study
import pytest

from etude.lab import run
from etude.lab.store import Store, StoreError


@pytest.fixture
def folder(tmp_path):
    run(plain_study.study, results=tmp_path / "results", workers=1, seeds=3)
    return tmp_path / "results"


def test_what_is_saved_is_read_back(folder):
    with Store(folder) as store:
        (stored,) = store.runs("plain")
        assert store.runs("other") == []
    assert stored.seeds == (0, 1, 2)
    assert stored.arms == ("method", "baseline")
    assert stored.config["points"] == 3
    assert stored.environment["torch"]
    assert stored.started <= stored.finished
    assert [(r["arm"], r["seed"]) for r in stored.results][::3] == [(a, s) for a in stored.arms for s in (0, 1, 2)]


def test_values_that_are_not_finite_survive(folder):
    with Store(folder, write=True) as store:
        (stored,) = store.runs()
        store.save(
            "x", run=stored.config_digest, arm="method", seed=9, seconds=1.0, now="now",
            records=[{"arm": "method", "seed": 9, "value": float("inf")}],
        )  # fmt: skip
        assert store.runs()[0].results.by_seed("value", "method")[9] == float("inf")


def test_a_missing_folder_says_what_to_run(tmp_path):
    with pytest.raises(StoreError, match="run a study first"):
        Store(tmp_path / "none")


def test_a_damaged_file_is_refused_and_left_alone(folder):
    path = folder / "etude.sqlite"
    damaged = b"not a database at all" * 100
    path.write_bytes(damaged)
    for write in (False, True):
        with pytest.raises(StoreError, match=r"damaged .* left as it is"):
            Store(folder, write=write)
    assert path.read_bytes() == damaged


def test_a_file_of_a_newer_version_is_refused(folder):
    connection = sqlite3.connect(folder / "etude.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"newer etude .*upgrade"):
        Store(folder)


def test_a_second_run_is_refused_at_once_and_names_the_first(folder):
    with (
        Store(folder, write=True),
        pytest.raises(StoreError, match=rf"another run \(process {os.getpid()}\).*--results"),
    ):
        Store(folder, write=True)
    Store(folder, write=True).close()


def test_reading_goes_on_while_a_run_writes(folder):
    with Store(folder, write=True), Store(folder) as reader:
        assert len(reader.runs()) == 1


def test_a_full_disk_stops_the_run_and_keeps_the_cells(folder):
    with Store(folder, write=True) as store:
        (before,) = store.runs()
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="disk is full"):
            store.save(
                "y", run=before.config_digest, arm="method", seed=8, seconds=1.0, now="now",
                records=[{"arm": "method", "seed": 8, "text": "x" * 100_000}],
            )  # fmt: skip
    with Store(folder) as store:
        assert store.runs()[0].results == before.results


def fill(path):
    try:
        with path.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
    except OSError:
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_keeps_the_cells(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        run(plain_study.study, results=disk, workers=1, seeds=2)
        before = Store(disk).runs()[0].results
        fill(disk / "filler")
        with pytest.raises((StoreError, OSError)):
            run(plain_study.study, results=disk, workers=1, seeds=40)
        (disk / "filler").unlink()
        after = run(plain_study.study, results=disk, workers=1, seeds=2)
        assert after.reused == 4
        assert {str(r) for r in before} <= {str(r) for r in Store(disk).runs()[0].results}
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to"):
        Store(tmp_path / "file" / "results", write=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_for_writing_and_read(folder):
    folder.chmod(0o500)
    with pytest.raises(StoreError, match="cannot write"):
        Store(folder, write=True)
    assert len(Store(folder).runs()) == 1
