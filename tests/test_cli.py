"""The command line: its answers, its exit codes, its one-line errors."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import plain_study
import pytest

from etude import cli
from etude.lab import catalogue, run

LIST = "import sys; sys.argv = ['etude', 'list']; from etude.__main__ import main; main()"


@pytest.fixture
def installed(monkeypatch):
    """The plain study as if its package were installed, and nothing else."""
    from importlib.metadata import EntryPoint

    entries = [
        EntryPoint("plain", "plain_study:study", catalogue.GROUP),
        EntryPoint("broken", "no_such_module:study", catalogue.GROUP),
    ]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: entries)


@pytest.fixture
def folder(tmp_path):
    run(plain_study.study, results=tmp_path / "results", workers=1, seeds=3)
    return tmp_path / "results"


def test_list_is_quick_and_does_not_import_torch():
    program = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); " + LIST
    times = []
    for _ in range(3):
        started = time.perf_counter()
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert "lottery-ticket" in found.stdout
    assert found.stdout.splitlines()[-1] == "False"
    assert min(times) < 1.0


def test_a_closed_pipe_and_a_poor_locale_are_no_errors():
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = f'"{sys.executable}" -c "{LIST}" | head -n 1'
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=True)
    assert found.stderr == ""


def test_list_and_show(installed, capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert "A plain <em>study</em> (2020)" in text
    assert "broken" in text
    assert "cannot be read" in text
    assert cli.main(["list", "--theme", "core"]) == 0
    assert cli.main(["show", "plain"]) == 0
    shown = capsys.readouterr().out
    assert "C1" in shown
    assert "method, baseline" in shown


def test_run_ends_with_verdicts_and_the_reports_place(installed, capsys, tmp_path):
    assert cli.main(["run", "plain", "--results", str(tmp_path), "--workers", "1", "--seeds", "3"]) == 0
    text = capsys.readouterr().out
    assert "[6/6]" in text
    assert "reproduced" in text
    assert (tmp_path / "report" / "index.html").exists()
    assert "file://" in text


def test_a_failed_cell_ends_with_one_and_its_traceback(installed, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIN_STUDY_FAILS", "baseline")
    assert cli.main(["run", "all", "--preset", "smoke", "--results", str(tmp_path), "--workers", "1"]) == 1
    assert "RuntimeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["lst"], "list"),
        (["run", "plan"], "did you mean 'plain'"),
        (["run", "plain", "--preset", "smal"], "did you mean 'small'"),
        (["run", "plain", "--backend", "lok"], "did you mean 'loky'"),
        (["run", "plain", "--presett", "small"], "--preset"),
        (["run", "plain", "--set", "point=3"], "did you mean 'points'"),
        (["run", "plain", "--set", "points"], "--set name=value"),
        (["run", "plain", "--set", "points=x"], "type int"),
        (["run", "plain", "--seeds", "0"], "seeds"),
        (["run", "plain", "--seeds", "three"], "integer"),
        (["run", "plain", "--device", "gpu9"], "'auto' or 'cpu'"),
        (["list", "--theme", "compres"], "--theme"),
        (["export", "--format", "cvs"], "did you mean 'csv'"),
        (["show"], "paper"),
        (["new", "My Paper"], "my-paper"),
    ],
)
def test_unusable_arguments_end_with_two_and_one_line(installed, capsys, tmp_path, monkeypatch, arguments, hint):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert hint in captured.err
    assert not (tmp_path / "results").exists()


def test_a_folder_that_cannot_be_used_ends_with_one_and_one_line(installed, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "plain", "--results", str(tmp_path / "file" / "x")]) == 1
    assert cli.main(["report", "--results", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_report_and_export(installed, capsys, folder, tmp_path):
    assert cli.main(["report", "--results", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "plain.html").exists()
    for kind in ("csv", "json", "parquet"):
        assert cli.main(["export", "--results", str(folder), "--format", kind]) == 0
    rows = json.loads((folder / "measurements.json").read_text())
    assert len(rows) == 18
    assert {"study", "arm", "seed", "value"} <= rows[0].keys()
    from pyarrow import parquet

    assert parquet.read_table(folder / "measurements.parquet").num_rows == 18
    assert (folder / "measurements.csv").read_text().count("\n") == 19


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("etude 0.")


def test_a_new_study_works_as_written(capsys, tmp_path):
    assert cli.main(["new", "my-paper", "--folder", str(tmp_path)]) == 0
    assert cli.main(["new", "my-paper", "--folder", str(tmp_path)]) == 2
    made = tmp_path / "my-paper"
    assert 'my-paper = "my_paper.study:study"' in (made / "pyproject.toml").read_text()
    environment = os.environ | {"PYTHONPATH": str(made / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    found = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert not Path("my-paper").exists()
