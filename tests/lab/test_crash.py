"""A run killed at random moments and resumed ends with the same table, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import plain_study

from etude.lab import run
from etude.lab.store import Store

KILLS = 20
PROGRAM = """
import sys
from pathlib import Path
import plain_study
from etude.lab import run
outcome = run(plain_study.study, results=Path(sys.argv[1]), seeds=60, workers=1, settings={"pause": 0.012})
sys.exit(0 if not outcome.failed else 1)
"""


def start(folder):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment, start_new_session=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished_cells(folder):
    try:
        with Store(folder) as store:
            runs = store.runs()
            return len(runs[0].results) // 3 if runs else 0
    except Exception:
        return 0


def test_twenty_kills_change_nothing(tmp_path):
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    run(plain_study.study, results=plain, seeds=60, workers=1, settings={"pause": 0.012})
    chance = random.Random(0)
    kills, kept = 0, []
    while kills < KILLS:
        process, begun = start(killed), finished_cells(killed)
        deadline = time.monotonic() + 60
        while finished_cells(killed) <= begun and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.12))
        assert process.poll() is None, (process.stderr.read(), "the run ended before it was killed often enough")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        kept.append(finished_cells(killed))
    assert kept == sorted(kept)
    assert kept[0] > 0
    assert len(set(kept)) > KILLS // 2
    last = start(killed)
    assert last.wait(timeout=120) == 0
    last.communicate()
    tables = []
    for folder in (plain, killed):
        with Store(folder) as store:
            tables.append(json.dumps([dict(record) for record in store.runs()[0].results]))
    assert tables[0] == tables[1]
