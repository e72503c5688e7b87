"""Where cells are computed: joblib's backends, one torch thread a cell."""

import importlib
import json
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.core.checks import InputError, check_one_of
from etude.lab.cells import Cell
from etude.lab.results import Record
from etude.lab.study import Measure

__all__ = ["BACKENDS", "Task", "TaskOutcome", "execute", "heartbeats"]

BACKENDS = ("loky", "threading", "dask", "ray")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """A cell with all that a worker needs to measure it."""

    measure: Measure
    config: Any
    cell: Cell
    device: str
    artifacts: Path
    beats: Path


@dataclass(frozen=True)
class TaskOutcome:
    """What a worker sends back: records, or the traceback of what was raised."""

    cell: Cell
    seconds: float
    records: tuple[Record, ...] | None
    failure: str | None = None


def execute(tasks: list[Task], backend: str, workers: int) -> Iterator[TaskOutcome]:
    """Measure the cells and yield each outcome as it comes.

    One worker on the default backend computes in this process.

    Raises:
        InputError: for an unknown backend, or one whose package is not installed.
    """
    import joblib

    check_one_of("backend", backend, BACKENDS)
    with ExitStack() as stack:
        if backend in ("dask", "ray"):
            stack.enter_context(_cluster(backend, workers))
        stack.enter_context(joblib.parallel_config(backend=backend, n_jobs=workers))
        generator = joblib.Parallel(return_as="generator_unordered")(joblib.delayed(_measure)(t) for t in tasks)
        # Closing the generator cancels what has not begun, whatever ended the loop.
        stack.callback(generator.close)
        yield from generator


def heartbeats(folder: Path, report: Callable[[str, float, dict[str, float]], None]) -> Callable[[], None]:
    """Watch the cells' heartbeat files from a thread and report each change; returns what stops it."""
    stop = threading.Event()
    seen: dict[Path, str] = {}

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            for path in folder.glob("*.json"):
                try:
                    text = path.read_text()
                    beat = json.loads(text)
                except (OSError, ValueError):
                    continue
                if seen.get(path) != text:
                    seen[path] = text
                    report(path.stem, beat["fraction"], beat["metrics"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    return end


def _measure(task: Task) -> TaskOutcome:
    """Measure one cell; whatever it raises comes back as a traceback."""
    import torch

    from etude.lab.context import CellContext

    started = time.perf_counter()
    scratch = Path(tempfile.mkdtemp(prefix="etude-"))
    beat = task.beats / f"{task.cell.digest}.json"
    try:
        with _reproducible(task.cell.digest):
            context = CellContext(torch.device(task.device), scratch, task.artifacts, beat)
            found = task.measure(task.config, task.cell.arm, task.cell.seed, context)
            records = tuple(
                _checked(record, task.cell) for record in ([found] if isinstance(found, Mapping) else found)
            )
        return TaskOutcome(task.cell, time.perf_counter() - started, records)
    except Exception:
        return TaskOutcome(task.cell, time.perf_counter() - started, None, traceback.format_exc())
    finally:
        beat.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _checked(record: Record, cell: Cell) -> Record:
    """The record with its arm and seed, its values plain JSON."""
    values: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed}
    for name, value in record.items():
        plain = value.item() if hasattr(value, "item") else value
        if not isinstance(plain, (bool, int, float, str, type(None))):
            raise InputError(
                f"got {type(value).__name__}",
                where=f"record entry {name!r}",
                instead="record numbers or text",
            )
        values[name] = plain
    return values


@contextmanager
def _reproducible(digest: str) -> Iterator[None]:
    """One torch thread and global generators seeded by the cell, so that order and backend do not matter."""
    import random

    import numpy as np
    import torch

    threads, states = torch.get_num_threads(), (random.getstate(), np.random.get_state())
    seed = int(digest[:8], 16)
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _cluster(backend: str, workers: int) -> Iterator[None]:
    try:
        importlib.import_module("ray.util.joblib" if backend == "ray" else "distributed")
    except ImportError as error:
        raise InputError(
            f"{backend!r} is not installed", where="backend", instead=f'pip install "etude[{backend}]"'
        ) from error
    if backend == "ray":
        import ray
        from ray.util.joblib import register_ray

        register_ray()
        if not ray.is_initialized():
            # An address in RAY_ADDRESS joins that cluster; without one a local cluster is started.
            ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else workers, log_to_driver=False)
        yield
        return
    from distributed import Client

    # A scheduler named in DASK_SCHEDULER_ADDRESS is joined; without one the workers are local.
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    local = {"processes": False, "n_workers": 1, "threads_per_worker": workers, "dashboard_address": None}
    with Client(address) if address else Client(**local):
        yield
