"""A working study to start from: a package with a method, its baseline, one claim, and a test."""

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from etude.core.checks import InputError
from etude.lab.catalogue import listings

__all__ = ["write_study"]

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
CONFUSED = "choose a name that no package or study has"
PLACES = {
    "pyproject.toml.jinja": "pyproject.toml",
    "README.md.jinja": "README.md",
    "study.py.jinja": "src/{package}/study.py",
    "package.py.jinja": "src/{package}/__init__.py",
    "test_study.py.jinja": "tests/test_study.py",
}


def write_study(name: str, folder: Path = Path()) -> Path:
    """Write the package into a new folder called ``name``.

    Args:
        name: the study's name: small letters, digits and single hyphens, beginning with a letter.
        folder: where to make it.

    Returns:
        The new folder.

    Raises:
        InputError: for another kind of name, one that a study or an installed package has, or a folder that is
            already there.
    """
    if not NAME.fullmatch(name):
        proposal = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789") or "my-paper"
        raise InputError(f"got {name!r}", where="name", instead=f"write it as {proposal!r}")
    target = Path(folder) / name
    if target.exists():
        raise InputError(f"{target} is already there", where="name", instead="choose another name or --folder")
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or importlib.util.find_spec(package):
        raise InputError(f"{package} is taken in Python", where="name", instead=CONFUSED)
    if name in {entry.slug for entry in listings()}:
        raise InputError(f"a study {name!r} is already installed", where="name", instead=CONFUSED)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    for source, place in PLACES.items():
        text = files(__name__).joinpath("files", source).read_text(encoding="utf-8")
        path = target / place.format(package=package)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(environment.from_string(text).render(name=name, package=package), encoding="utf-8")
    return target
