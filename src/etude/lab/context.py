"""What the engine lends to a measurement: a device, scratch space, shared artifacts, progress."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from etude.core.checks import InputError

__all__ = ["CellContext"]

BEAT_SECONDS = 0.5


class CellContext:
    """The `etude.lab.Context` of one running cell.

    Args:
        device: where to compute.
        scratch: a folder of the cell's own.
        artifacts: where tensors shared by the arms of one run and seed lie.
        beat: the file in which the cell tells how far it is.
    """

    def __init__(self, device: torch.device, scratch: Path, artifacts: Path, beat: Path):
        self.device = device
        self.scratch = scratch
        self._artifacts = artifacts
        self._beat = beat
        self._last_beat = 0.0

    def artifact(self, name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors made once and read by every arm that asks; see `etude.lab.Context`."""
        if not name or Path(name).name != name:
            raise InputError(f"got {name!r}", where="artifact", instead="give a plain file name")
        path = self._artifacts / f"{name}.safetensors"
        self._artifacts.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            found = _load(path, self.device)
            if found is None:
                tensors = {key: value.detach().cpu().contiguous().clone() for key, value in make().items()}
                _save(tensors, path)
                # Read back rather than handed on: the arm that made them sees what all others will see.
                found = _load(path, self.device)
        if found is None:
            raise OSError(f"{path} cannot be read back")
        return found

    def progress(self, fraction: float, **metrics: float) -> None:
        """Tell the driver how far this cell is; at most twice a second something is written."""
        now = time.monotonic()
        if now - self._last_beat < BEAT_SECONDS:
            return
        self._last_beat = now
        values = {name: float(value) for name, value in metrics.items()}
        try:
            temporary = self._beat.with_suffix(".part")
            temporary.write_text(json.dumps({"fraction": float(fraction), "metrics": values}))
            os.replace(temporary, self._beat)
        except OSError:
            pass  # progress is a courtesy: a full disk must not end a measurement


def _load(path: Path, device: torch.device) -> dict[str, torch.Tensor] | None:
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError):
        return None


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
