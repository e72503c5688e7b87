"""The results folder: one SQLite file of finished cells, written by the driver only, a transaction a cell."""

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from etude.lab.results import Record, Results

__all__ = ["Store", "StoreError", "StoredFailure", "StoredRun"]

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE run (
    digest TEXT PRIMARY KEY,      -- of study, configuration and what else determines its cells
    study TEXT NOT NULL,
    preset TEXT NOT NULL,
    config TEXT NOT NULL,
    arms TEXT NOT NULL,
    environment TEXT NOT NULL,
    started TEXT NOT NULL,
    finished TEXT NOT NULL
);
CREATE TABLE cell (
    digest TEXT PRIMARY KEY,
    run TEXT NOT NULL REFERENCES run (digest),
    arm TEXT NOT NULL,
    seed INTEGER NOT NULL,
    seconds REAL NOT NULL,
    records TEXT,                 -- NULL when the cell failed
    failure TEXT
);
CREATE INDEX cell_run ON cell (run);
"""


class StoreError(Exception):
    """A results folder that cannot be used as it is; the message says what to do. Finished cells are kept."""


@dataclass(frozen=True)
class StoredFailure:
    """A cell that raised, with its traceback."""

    arm: str
    seed: int
    traceback: str


@dataclass(frozen=True)
class StoredRun:
    """Everything a results folder knows of one study at one configuration.

    Args:
        study: the study's slug.
        preset: the preset it was started from.
        config: the configuration's fields.
        config_digest: digest of all that determines its cells but arm and seed.
        arms: the study's arms.
        seeds: the seeds with a finished cell.
        started: when the first cell was begun, ISO 8601 in UTC.
        finished: when the last cell was stored.
        seconds: computing time, summed over cells.
        environment: versions and device by name.
        results: what the finished cells measured.
        failures: the cells that raised.
    """

    study: str
    preset: str
    config: dict[str, Any]
    config_digest: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    started: str
    finished: str
    seconds: float
    environment: dict[str, str]
    results: Results
    failures: tuple[StoredFailure, ...]


class Store:
    """One results folder.

    Args:
        folder: where ``etude.sqlite`` lies.
        write: whether to write: makes the folder, and holds its lock until `close`.

    Raises:
        StoreError: if the folder is missing (reading) or not writable (writing), another run holds it, or the
            file is damaged or was written by a newer etude.
    """

    def __init__(self, folder: Path, *, write: bool = False):
        self.folder = Path(folder)
        self.path = self.folder / "etude.sqlite"
        self._lock = _lock_folder(self.folder) if write else None
        try:
            self._connection = self._open(write)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._connection.close()
        self._release()

    def begin(self, digest: str, run: StoredRun) -> None:
        """Enter a run, or mark one that is already there as gone on."""
        row = (
            digest,
            run.study,
            run.preset,
            json.dumps(run.config),
            json.dumps(run.arms),
            json.dumps(run.environment),
            run.started,
            run.finished,
        )
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
                "preset = excluded.preset, environment = excluded.environment",
                row,
            )

    def finished_cells(self, run: str) -> dict[str, tuple[Record, ...]]:
        """The records of a run's finished cells, by cell digest."""
        with self._reading() as connection:
            rows = connection.execute("SELECT digest, records FROM cell WHERE run = ? AND records IS NOT NULL", (run,))
            return {digest: tuple(json.loads(records)) for digest, records in rows}

    def save(
        self,
        digest: str,
        *,
        run: str,
        arm: str,
        seed: int,
        seconds: float,
        now: str,
        records: Iterable[Record] | None,
        failure: str | None = None,
    ) -> None:
        """Store one cell, finished or failed, in a transaction of its own."""
        text = None if records is None else json.dumps([dict(record) for record in records])
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO cell VALUES (?, ?, ?, ?, ?, ?, ?)",
                (digest, run, arm, seed, seconds, text, failure),
            )
            connection.execute("UPDATE run SET finished = ? WHERE digest = ?", (now, run))

    def forget(self, digests: Iterable[str]) -> None:
        """Remove cells, so that they are measured anew."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM cell WHERE digest = ?", [(digest,) for digest in digests])

    def runs(self, study: str | None = None) -> list[StoredRun]:
        """The runs in this folder, newest first; those of one study if named."""
        with self._reading() as connection:
            rows = connection.execute("SELECT * FROM run ORDER BY finished DESC, started DESC").fetchall()
            return [self._assemble(connection, row) for row in rows if study in (None, row["study"])]

    def _assemble(self, connection: sqlite3.Connection, row: sqlite3.Row) -> StoredRun:
        arms = tuple(json.loads(row["arms"]))
        cells = connection.execute("SELECT * FROM cell WHERE run = ?", (row["digest"],)).fetchall()
        # The table's order must not depend on the order in which cells happened to finish.
        place = {arm: index for index, arm in enumerate(arms)}
        cells.sort(key=lambda cell: (place.get(cell["arm"], len(place)), cell["arm"], cell["seed"]))
        done = [cell for cell in cells if cell["records"] is not None]
        return StoredRun(
            study=row["study"],
            preset=row["preset"],
            config=json.loads(row["config"]),
            config_digest=row["digest"],
            arms=arms,
            seeds=tuple(sorted({cell["seed"] for cell in done})),
            started=row["started"],
            finished=row["finished"],
            seconds=sum(cell["seconds"] for cell in cells),
            environment=json.loads(row["environment"]),
            results=Results(record for cell in done for record in json.loads(cell["records"])),
            failures=tuple(
                StoredFailure(cell["arm"], cell["seed"], cell["failure"] or "")
                for cell in cells
                if cell["records"] is None
            ),
        )

    def _open(self, write: bool) -> sqlite3.Connection:
        if not write and not self.path.exists():
            raise StoreError(f"no results in {self.folder}; run a study first: etude run all --results {self.folder}")
        if not write and not os.access(self.folder, os.W_OK):
            # WAL writes beside the file even to read it; a folder nobody can write to does not change.
            location, uri = f"file:{self.path}?immutable=1", True
        else:
            location, uri = str(self.path), False
        connection = sqlite3.connect(location, uri=uri, isolation_level=None, timeout=30)
        connection.row_factory = sqlite3.Row
        try:
            with _explained(self.path):
                self._prepare(connection, write)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection, write: bool) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer etude (format {version}, this one reads up to "
                f"{SCHEMA_VERSION}); upgrade etude, or choose another folder with --results"
            )
        if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
        if write:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if version == 0:
                connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path):
            yield self._connection

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _lock_folder(folder: Path) -> FileLock:
    """Hold the folder's lock, which dies with the process, so that a killed run leaves none behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "etude.lock")
        lock.acquire(timeout=0)
        (folder / "etude.pid").write_text(str(os.getpid()))
    except Timeout:
        raise StoreError(
            f"another run (process {_holder(folder)}) is writing to {folder}; wait for it, or choose another "
            "folder with --results"
        ) from None
    except OSError as error:
        raise StoreError(
            f"cannot write to {folder} ({error.strerror}); choose another folder with --results"
        ) from error
    return lock


def _holder(folder: Path) -> str:
    try:
        return (folder / "etude.pid").read_text()
    except OSError:
        return "unknown"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what a failing SQLite means for the user's results."""
    try:
        yield
    except sqlite3.OperationalError as error:
        reason = str(error)
        if "full" in reason:
            reason = "the disk is full; free some room and run again, finished cells are kept"
        elif "readonly" in reason or "unable to open" in reason:
            reason = "it cannot be written; choose another folder with --results"
        raise StoreError(f"{path}: {reason}") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"{path} is damaged ({error}); it was left as it is: save what can be read with "
            f"sqlite3 {path.name} .recover, or choose another folder with --results"
        ) from error
