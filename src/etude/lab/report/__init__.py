"""The static report of a results folder."""

from etude._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, names={"site": ["build"]})
