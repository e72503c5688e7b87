"""Time two ways of doing the same work, alternately in one process, and write the ratio down.

Every benchmark is a script: ``python benchmarks/<name>.py`` prints its comparisons and writes them to
``docs/results/benchmarks/<name>.json``.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "docs" / "results" / "benchmarks"


@dataclass(frozen=True)
class Comparison:
    """Ours against a peer: seconds are medians, the ratio is the median of the paired ratios."""

    work: str
    peer: str
    ours_seconds: float
    peer_seconds: float
    ratio: float
    lowest: float
    highest: float
    aim: float | None = None
    agreement: str = ""


def compare(
    work: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    repeats: int = 7,
    aim: float | None = None,
    agreement: str = "",
) -> Comparison:
    """Run both once unmeasured, then alternately ``repeats`` times."""
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    return Comparison(
        work,
        peer,
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        aim,
        agreement,
    )


def write(name: str, comparisons: list[Comparison]) -> None:
    """Print the comparisons and write them to the results folder."""
    for each in comparisons:
        aim = f", aim {each.aim:g}" if each.aim is not None else ""
        print(f"{each.work}: {each.ratio:.3f} of {each.peer} [{each.lowest:.3f}, {each.highest:.3f}]{aim}")
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment, "comparisons": [asdict(each) for each in comparisons]}
    (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
