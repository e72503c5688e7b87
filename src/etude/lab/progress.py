"""Show a run as it goes: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from etude.lab.engine import CellFailed, CellFinished, CellProgress, Event, Planned
from etude.lab.results import Record
from etude.lab.wording import number

__all__ = ["ProgressDisplay"]


class ProgressDisplay:
    """A listener for `etude.lab.run` that shows cells done, the current metric and the time left.

    Args:
        console: where to show it; without a terminal that can move its cursor, finished cells are plain lines.
    """

    def __init__(self, console: Console):
        self.console = console
        self._bar = _bar(console) if console.is_terminal and not console.is_dumb_terminal else None
        self._task: TaskID | None = None
        self._total = self._done = 0
        self._started = 0.0
        self._began_with = 0
        self._fractions: dict[tuple[str, int], float] = {}

    def __enter__(self) -> "ProgressDisplay":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Planned):
            self._plan(event)
        elif isinstance(event, CellProgress):
            self._fractions[event.arm, event.seed] = event.fraction
            self._update(f"{event.arm}, seed {event.seed}: {_shown(event.metrics)}".removesuffix(": "))
        elif isinstance(event, CellFinished):
            self._finish(event)
        else:
            self._fail(event)

    def _plan(self, event: Planned) -> None:
        self._total, self._done, self._began_with = event.total, event.done, event.done
        self._started = time.monotonic()
        self._fractions.clear()
        kept = f", {event.done} kept from before" if event.done else ""
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(
                event.study.slug, total=event.total, completed=event.done, metric=kept.lstrip(", "), left=""
            )
        else:
            self._line(f"{event.study.slug}: {event.total} cells{kept}")

    def _finish(self, event: CellFinished) -> None:
        self._done += 1
        self._fractions.pop((event.arm, event.seed), None)
        metric = _headline(event.records, event.study.headline)
        text = f"{event.arm}, seed {event.seed}: {metric}" if metric else f"{event.arm}, seed {event.seed}"
        if self._bar:
            self._update(text)
        else:
            timing = f"{event.seconds:.1f} s" + (f"; {self._left()}" if self._done < self._total else "")
            self._line(f"[{self._done}/{self._total}] {text} ({timing})")

    def _fail(self, event: CellFailed) -> None:
        self._done += 1
        self._fractions.pop((event.arm, event.seed), None)
        self._line(f"[{self._done}/{self._total}] {event.arm}, seed {event.seed}: failed")
        self._update("")

    def _update(self, metric: str) -> None:
        if self._bar and self._task is not None:
            completed = self._done + sum(self._fractions.values())
            self._bar.update(self._task, completed=completed, metric=metric, left=self._left())

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _left(self) -> str:
        """Time left at the pace so far."""
        done = self._done - self._began_with + sum(self._fractions.values())
        if not done:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self._total - self._began_with - done)
        for unit, size in (("s", 1), ("min", 60)):
            if seconds < 90 * size:
                return f"{seconds / size:.0f} {unit} left"
        return f"{seconds / 3600:.1f} h left"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", style="dim"),
        TextColumn("{task.fields[metric]}", markup=False, style="dim"),
        console=console,
        transient=True,
    )


def _headline(records: tuple[Record, ...], metric: str) -> str:
    values = [record[metric] for record in records if isinstance(record.get(metric), (int, float))]
    return f"{metric} {number(float(values[-1]))}" if values else ""


def _shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in metrics.items())
