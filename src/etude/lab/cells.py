"""A cell is one (study, configuration, arm, seed), keyed by a digest of all that determines its outcome."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from etude import __version__
from etude.core.checks import InputError, check_one_of, nearest
from etude.data.sets import available, identity
from etude.lab.study import PRESETS, Study

__all__ = ["Cell", "configure", "plan", "run_digest"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One unit of work: independent of all others, never run twice."""

    digest: str
    arm: str
    seed: int


def configure(study: Study, preset: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The configuration a preset means on this machine, with ``settings`` put in.

    Args:
        study: the study.
        preset: ``smoke``, ``small`` or ``paper``; of several configurations the first whose data sets are on
            this machine is taken, the last if none is.
        settings: values for the configuration's fields; text is read as the field's type.

    Raises:
        InputError: for an unknown preset or field, or text that does not read as the field's type.
    """
    check_one_of("preset", preset, PRESETS)
    choices = study.presets[preset]
    options = choices if isinstance(choices, tuple) else (choices,)
    at_hand = (option for option in options if all(available(name) for name in study.data_sets(option)))
    config = next(at_hand, options[-1])
    types_by_name = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config)]
    values = {}
    for name, value in (settings or {}).items():
        if name not in names:
            raise InputError(f"{study.slug} has no setting {name!r}", where="--set", instead=nearest(name, names))
        values[name] = _parse(name, value, types_by_name[name]) if isinstance(value, str) else value
    return dataclasses.replace(config, **values)


def plan(study: Study, config: Any, seeds: tuple[int, ...], device: str) -> tuple[Cell, ...]:
    """The cells of a run, ordered so that arms sharing an artifact are not begun at the same time."""
    run = run_digest(study, config, device)
    return tuple(
        Cell(hashlib.sha256(json.dumps([run, arm, seed]).encode()).hexdigest(), arm, seed)
        for arm in study.arms
        for seed in seeds
    )


def run_digest(study: Study, config: Any, device: str) -> str:
    """Digest of what determines a run's cells but for arm and seed.

    That is: the study's and its methods' source (comments, docstrings and layout do not count), the
    configuration, the data sets' identity, etude's version and the kind of device.
    """
    modules = [study.origin, *(name.strip() for name in study.method.split(","))]
    parts = {
        "study": study.slug,
        "config": dataclasses.asdict(config),
        "sources": [_source_digest(module) for module in modules],
        "data": {name: identity(name) for name in study.data_sets(config)},
        "etude": __version__,
        "device": device,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache
def _source_digest(module: str) -> str:
    spec = importlib.util.find_spec(module) if module and module != "__main__" else None
    if spec is None or spec.origin is None:
        return module
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _parse(name: str, text: str, kind: Any) -> Any:
    """Read ``text`` as a value of the annotated type ``kind``."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        if option is not type(None):
            try:
                return _read(text, option)
            except ValueError:
                continue
    shown = getattr(kind, "__name__", str(kind))
    raise InputError(f"got {text!r}", where=f"--set {name}", instead=f"give a value of type {shown}")


def _read(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        return tuple(_read(item, typing.get_args(kind)[0]) for item in items)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)
