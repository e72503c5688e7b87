"""Intervals on values paired by seed, and the verdicts drawn from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import stats

__all__ = ["Interval", "Verdict", "bootstrap_mean", "wilson"]

RESAMPLES = 10_000
FEWEST_SEEDS = 3


class Verdict(StrEnum):
    """What the evidence says of a claim."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def above(self, bound: float) -> Verdict:
        """Reproduced if the whole interval is above ``bound``, not reproduced if all of it is below."""
        if math.isnan(self.mean):
            return Verdict.INCONCLUSIVE
        if self.low > bound:
            return Verdict.REPRODUCED
        return Verdict.NOT_REPRODUCED if self.high < bound else Verdict.INCONCLUSIVE


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """95% interval of the mean by the expanded percentile bootstrap, never shorter than Student's.

    The plain percentile interval is too short for a handful of seeds (it ignores that the spread is
    estimated). Hesterberg's correction reads the percentiles of the resampled means at the level
    ``Phi(-sqrt(n / (n - 1)) t)`` with ``t`` Student's quantile, which is exact to second order for the
    normal case. Resampling cannot leave the range of the values, though, which misses the mean of three
    normal values one time in four: hence the bound. Resampling is seeded, so equal values give equal
    intervals.

    >>> interval = bootstrap_mean([1.0, 2.0, 3.0])
    >>> interval.mean, round(interval.low, 3), round(interval.high, 3)
    (2.0, -0.484, 4.484)
    """
    sample = np.asarray(values, dtype=np.float64)
    count = len(sample)
    if count == 0 or not np.isfinite(sample).all():
        return Interval(math.nan, math.nan, math.nan)
    mean = float(sample.mean())
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    quantile = float(stats.t.ppf(0.975, count - 1))
    level = stats.norm.cdf(-math.sqrt(count / (count - 1)) * quantile)
    draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(sample[draws].mean(axis=1), [level, 1 - level])
    half = quantile * float(sample.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, min(float(low), mean - half), max(float(high), mean + half))


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's 95% score interval of a success rate.

    >>> rate = wilson(5, 10)
    >>> round(rate.low, 3), round(rate.high, 3)
    (0.237, 0.763)
    """
    if trials == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = float(stats.norm.ppf(0.975))
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2))
    return Interval(rate, max(centre - half, 0.0), min(centre + half, 1.0))
