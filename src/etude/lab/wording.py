"""How numbers, intervals and findings are worded, alike in the terminal and in the report."""

import math
from typing import Any

from etude.lab.rules import Finding
from etude.lab.statistics import Interval

__all__ = ["effect", "interval", "number"]

SMALLEST, LARGEST = 1e-4, 1e7
MOST_DECIMALS = 8


def number(value: Any) -> str:
    """A value to four significant digits, in full as long as that is short; what is no float as it is.

    >>> number(0.123456), number(12345.6), number(0.1), number(1.5e-7), number(3), number(None)
    ('0.1235', '12346', '0.1', '1.5e-07', '3', '')
    """
    if value is None:
        return ""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value and not SMALLEST <= abs(value) < LARGEST:
        return f"{value:.4g}"
    whole_digits = math.floor(math.log10(abs(value))) + 1 if value else 1
    text = f"{value:.{max(4 - whole_digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def interval(found: Interval) -> str:
    """A mean with its interval, all to the same decimals: two significant digits of the half-width.

    >>> interval(Interval(0.50381, 0.18372, 0.82384)), interval(Interval(120.4, 95.0, 145.8))
    ('0.50 [0.18, 0.82]', '120 [95, 146]')
    """
    mean, low, high = _aligned(found)
    return f"{mean} [{low}, {high}]" if low else mean


def effect(finding: Finding, failures: int = 0) -> str:
    """The effect with its interval, or why there is none; ``failures`` are the run's failed cells."""
    if finding.seeds == 0:
        return "not measured: cells failed" if failures else "not measured in this preset"
    if math.isnan(finding.effect.mean):
        return "undefined (a value is not finite, or not positive for a ratio)"
    return interval(finding.effect)


def _aligned(found: Interval) -> tuple[str, str, str]:
    """Mean, low and high as text; low and high empty where one seed gives no interval."""
    values = (found.mean, found.low, found.high)
    half = (found.high - found.low) / 2
    if not all(map(math.isfinite, values)):
        return number(found.mean), "", ""
    if not half or not SMALLEST <= max(map(abs, values)) < LARGEST:
        return number(found.mean), number(found.low), number(found.high)
    decimals = min(max(1 - math.floor(math.log10(half)), 0), MOST_DECIMALS)
    # Adding zero turns a negative zero into zero.
    mean, low, high = (f"{round(value, decimals) + 0.0:.{decimals}f}" for value in values)
    return mean, low, high
