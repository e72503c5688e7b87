"""Numbers and findings are worded so that a reader sees what counts and nothing that is not there."""

import math

import pytest

from etude.lab import wording
from etude.lab.rules import Finding
from etude.lab.statistics import Interval, Verdict


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.5, "-0.5"),
        (0.123456, "0.1235"),
        (1.0, "1"),
        (99.996, "100"),
        (12345.678, "12346"),
        (0.00012345, "0.0001234"),
        (0.00001, "1e-05"),
        (123456789.0, "1.235e+08"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (30, "30"),
        (True, "True"),
        ("text", "text"),
        (None, ""),
    ],
)
def test_number(value, text):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (0.5, 0.25, 0.75, "0.50 [0.25, 0.75]"),
        (-0.0001, -0.02, 0.0198, "0.000 [-0.020, 0.020]"),
        (12345.0, 11000.0, 13690.0, "12345 [11000, 13690]"),
        (0.5, 0.5, 0.5, "0.5 [0.5, 0.5]"),
        (0.5, -math.inf, math.inf, "0.5"),
        (2e-6, 1e-6, 3e-6, "2e-06 [1e-06, 3e-06]"),
        (0.5, 0.5 - 1e-12, 0.5 + 1e-12, "0.50000000 [0.50000000, 0.50000000]"),
    ],
)
def test_interval(mean, low, high, text):
    assert wording.interval(Interval(mean, low, high)) == text


def test_what_has_no_effect_says_why():
    nothing = Interval(math.nan, math.nan, math.nan)
    assert wording.effect(Finding(Verdict.INCONCLUSIVE, nothing, "", 0)) == "not measured in this preset"
    assert wording.effect(Finding(Verdict.INCONCLUSIVE, nothing, "", 0), failures=1) == "not measured: cells failed"
    assert "not finite" in wording.effect(Finding(Verdict.INCONCLUSIVE, nothing, "", 3))
    assert wording.effect(Finding(Verdict.REPRODUCED, Interval(1.0, 1.0, 1.0), "", 3)) == "1 [1, 1]"
