"""Run a study's missing cells, keep every finished one, and judge its claims."""

import dataclasses
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from etude import __version__
from etude.core.checks import InputError, check_at_least, check_one_of
from etude.lab.cells import Cell, configure, plan, run_digest
from etude.lab.executors import BACKENDS, Task, TaskOutcome, execute, heartbeats
from etude.lab.results import Record, Results
from etude.lab.rules import Finding
from etude.lab.statistics import Verdict
from etude.lab.store import Store, StoredFailure, StoredRun
from etude.lab.study import Claim, Study

__all__ = [
    "CellFailed",
    "CellFinished",
    "CellProgress",
    "Event",
    "Judgement",
    "Outcome",
    "Planned",
    "judge",
    "run",
]

SMOKE_SEEDS = 2


@dataclasses.dataclass(frozen=True)
class Planned:
    """A study's cells are counted: ``total`` in all, ``done`` of them kept from before."""

    study: Study
    total: int
    done: int


@dataclasses.dataclass(frozen=True)
class CellProgress:
    """A running cell tells how far it is (0 to 1) and its current metrics."""

    study: Study
    arm: str
    seed: int
    fraction: float
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class CellFinished:
    """A cell is measured and stored."""

    study: Study
    arm: str
    seed: int
    seconds: float
    records: tuple[Record, ...]


@dataclasses.dataclass(frozen=True)
class CellFailed:
    """A cell raised; its traceback is stored and the others go on."""

    study: Study
    arm: str
    seed: int
    traceback: str


Event = Planned | CellProgress | CellFinished | CellFailed
Listener = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did.

    Args:
        study: the study's slug.
        config: the configuration it ran.
        finished: cells measured now.
        reused: cells kept from before.
        failed: cells that raised.
        interrupted: whether Ctrl-C ended it; finished cells are kept.
    """

    study: str
    config: Any
    finished: int
    reused: int
    failed: tuple[StoredFailure, ...]
    interrupted: bool


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A claim and what the results say of it."""

    claim: Claim
    finding: Finding


def run(
    study: Study,
    *,
    preset: str = "small",
    seeds: int | Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    backend: str = "loky",
    workers: int | None = None,
    device: str = "auto",
    results: Path = Path("results"),
    fresh: bool = False,
    tracker: str | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Measure the cells of a study that ``results`` does not hold yet.

    Args:
        study: the study.
        preset: ``smoke``, ``small`` or ``paper``.
        seeds: how many, or which; by default the study's own number (two for ``smoke``).
        settings: values for single fields of the configuration.
        backend: joblib's ``loky`` (processes), ``threading``, ``dask`` or ``ray``.
        workers: cells at a time; by default one a core, and one on an accelerator.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``...
        results: the results folder.
        fresh: measure the cells anew that are already there.
        tracker: also log every finished cell to ``tensorboard``, ``wandb`` or ``mlflow``.
        listener: called with every event.

    Raises:
        InputError: for unusable arguments, before anything is measured.
        StoreError: if the results folder cannot be used; finished cells are kept.
    """
    config = configure(study, preset, settings)
    chosen = _choose_seeds(study, preset, seeds)
    place = _choose_device(device)
    count = _choose_workers(workers, place)
    check_one_of("backend", backend, BACKENDS)
    digest = run_digest(study, config, place.partition(":")[0])
    cells = plan(study, config, chosen, place.partition(":")[0])
    tell = listener or (lambda event: None)
    track, end_tracking = _tracker(tracker, study, config, Path(results))
    with Store(Path(results), write=True) as store:
        _begin(store, study, preset, config, digest, place)
        artifacts = Path(results) / "artifacts" / digest[:16]
        if fresh:
            store.forget(cell.digest for cell in cells)
            shutil.rmtree(artifacts, ignore_errors=True)
        done = store.finished_cells(digest)
        missing = [cell for cell in cells if cell.digest not in done]
        tell(Planned(study, len(cells), len(cells) - len(missing)))
        driver = _Driver(study, digest, store, tell, track)
        interrupted = driver.go(missing, config, place, artifacts, backend, count)
        if not interrupted and not driver.failed:
            shutil.rmtree(artifacts, ignore_errors=True)
    end_tracking()
    return Outcome(study.slug, config, driver.finished, len(cells) - len(missing), tuple(driver.failed), interrupted)


def judge(study: Study, found: StoredRun | Results, preset: str | None = None) -> tuple[Judgement, ...]:
    """Decide every claim on a run's results; ``smoke`` proves that a study runs and decides nothing."""
    results = found.results if isinstance(found, StoredRun) else found
    level = preset or (found.preset if isinstance(found, StoredRun) else "small")
    judgements = []
    for claim in study.claims:
        finding = claim.rule(results)
        if level == "smoke":
            finding = dataclasses.replace(finding, verdict=Verdict.INCONCLUSIVE)
        judgements.append(Judgement(claim, finding))
    return tuple(judgements)


class _Driver:
    """The only writer: takes outcomes as they come, stores each, and tells the listener."""

    def __init__(self, study: Study, digest: str, store: Store, tell: Listener, track: Callable[..., None]):
        self.study, self.digest, self.store = study, digest, store
        self.tell, self.track = tell, track
        self.finished = 0
        self.failed: list[StoredFailure] = []

    def go(self, cells: list[Cell], config: Any, device: str, artifacts: Path, backend: str, workers: int) -> bool:
        """Measure ``cells``; returns whether it was interrupted."""
        # Beats live in the results folder, which workers on other machines share too.
        beats = Path(tempfile.mkdtemp(prefix="beats-", dir=self.store.folder)).absolute()
        by_digest = {cell.digest: cell for cell in cells}

        def beat(digest: str, fraction: float, metrics: dict[str, float]) -> None:
            if cell := by_digest.get(digest):
                self.tell(CellProgress(self.study, cell.arm, cell.seed, fraction, metrics))

        tasks = [
            Task(self.study.measure, config, cell, device, (artifacts / str(cell.seed)).absolute(), beats)
            for cell in cells
        ]
        end_beats = heartbeats(beats, beat)
        outcomes = execute(tasks, backend, min(workers, max(len(tasks), 1)))
        try:
            for outcome in outcomes:
                self._take(outcome)
        except KeyboardInterrupt:
            return True
        finally:
            outcomes.close()  # type: ignore[attr-defined]
            end_beats()
            shutil.rmtree(beats, ignore_errors=True)
        return False

    def _take(self, outcome: TaskOutcome) -> None:
        cell = outcome.cell
        self.store.save(
            cell.digest,
            run=self.digest,
            arm=cell.arm,
            seed=cell.seed,
            seconds=outcome.seconds,
            now=_now(),
            records=outcome.records,
            failure=outcome.failure,
        )
        if outcome.records is None:
            self.failed.append(StoredFailure(cell.arm, cell.seed, outcome.failure or ""))
            self.tell(CellFailed(self.study, cell.arm, cell.seed, outcome.failure or ""))
            return
        self.finished += 1
        self.track(cell, outcome.records, self.finished)
        self.tell(CellFinished(self.study, cell.arm, cell.seed, outcome.seconds, outcome.records))


def _begin(store: Store, study: Study, preset: str, config: Any, digest: str, device: str) -> None:
    now = _now()
    entry = StoredRun(
        study=study.slug,
        preset=preset,
        config=dataclasses.asdict(config),
        config_digest=digest,
        arms=study.arms,
        seeds=(),
        started=now,
        finished=now,
        seconds=0.0,
        environment=_environment(device),
        results=Results(()),
        failures=(),
    )
    store.begin(digest, entry)


def _choose_seeds(study: Study, preset: str, seeds: int | Sequence[int] | None) -> tuple[int, ...]:
    if seeds is None:
        seeds = SMOKE_SEEDS if preset == "smoke" else study.seeds
    if isinstance(seeds, int):
        check_at_least("seeds", seeds, 1)
        return tuple(range(seeds))
    chosen = tuple(seeds)
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise InputError(f"got {list(chosen)}", where="seeds", instead="give distinct numbers of at least 0")
    return chosen


def _choose_device(device: str) -> str:
    import torch

    if device == "auto":
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            return "cpu"
        from accelerate import PartialState

        return str(PartialState().device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{device!r} cannot be used: {reason}", where="device", instead="give 'auto' or 'cpu'"
        ) from error
    return device


def _choose_workers(workers: int | None, device: str) -> int:
    if workers is not None:
        return int(check_at_least("workers", workers, 1))
    if device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tracker(
    name: str | None, study: Study, config: Any, folder: Path
) -> tuple[Callable[[Cell, tuple[Record, ...], int], None], Callable[[], None]]:
    """A function that logs a finished cell with one of Accelerate's trackers, and one that ends it."""
    if name is None:
        return lambda cell, records, step: None, lambda: None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    check_one_of("tracker", name, [str(kind) for kind in LOGGER_TYPE_TO_CLASS])
    if not filter_trackers([name], str(folder)):
        raise InputError(f"{name!r} is not installed", where="tracker", instead=f"pip install {name}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    arguments = {"logging_dir": str(folder / "tracker")} if kind.requires_logging_directory else {}
    tracker = kind(study.slug, **arguments)
    tracker.start()
    tracker.store_init_configuration(
        {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in dataclasses.asdict(config).items()}
    )

    def log(cell: Cell, records: tuple[Record, ...], step: int) -> None:
        numbers = {
            f"{cell.arm}/{key}": float(value)
            for record in records
            for key, value in record.items()
            if key != "seed" and isinstance(value, (int, float))
        }
        tracker.log(numbers, step=step)

    return log, tracker.finish


def _environment(device: str) -> dict[str, str]:
    found = {
        "etude": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads per cell": "1",
    }
    for package in ("torch", "numpy", "scipy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = getattr(sys.modules.get(package), "__version__", "unknown")
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
