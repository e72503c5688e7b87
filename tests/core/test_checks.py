"""Input errors say what, where and what instead; checks return what they were given."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.core.checks import (
    InputError,
    UnsupportedModuleError,
    check_at_least,
    check_fraction,
    check_one_of,
    nearest,
)


@pytest.mark.parametrize(
    ("where", "instead", "message"),
    [
        (None, None, "got 3"),
        ("rounds", None, "rounds: got 3"),
        (None, "give 4", "got 3; give 4"),
        ("rounds", "give 4", "rounds: got 3; give 4"),
    ],
)
def test_input_error_joins_what_it_is_told(where, instead, message):
    error = InputError("got 3", where=where, instead=instead)
    assert str(error) == message
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("encoder.0", "module 'encoder.0' (dict): has no weight; remove it"),
        ("", "module '(the model itself)' (dict): has no weight; remove it"),
    ],
)
def test_unsupported_module_error_names_path_and_class(path, message):
    error = UnsupportedModuleError(path, {}, "has no weight", instead="remove it")
    assert str(error) == message
    assert isinstance(error, InputError)


def test_nearest_names_the_close_one_or_lists_all():
    assert nearest("accuraci", ["loss", "accuracy"]) == "did you mean 'accuracy'?"
    assert nearest("zzz", ["loss", "accuracy"]) == "use one of 'loss', 'accuracy'"
    assert nearest("losss", (name for name in ["loss"])) == "did you mean 'loss'?"


def test_check_one_of():
    assert check_one_of("kind", "a", (name for name in "ab")) == "a"
    with pytest.raises(InputError, match=r"kind: got 'layr'; did you mean 'layer'\?"):
        check_one_of("kind", "layr", ["layer", "global"])


@given(st.floats(allow_nan=True, allow_infinity=True), st.booleans(), st.booleans())
def test_check_fraction_accepts_the_interval_and_nothing_else(value, zero, one):
    inside = 0 < value < 1 or (zero and value == 0) or (one and value == 1)
    if inside:
        assert check_fraction("share", value, zero=zero, one=one) == value
    else:
        interval = ("[" if zero else "(") + "0, 1" + ("]" if one else ")")
        with pytest.raises(InputError) as caught:
            check_fraction("share", value, zero=zero, one=one)
        assert str(caught.value) == f"share: got {value!r}; give a fraction in {interval}"


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 10), st.booleans())
def test_check_at_least_accepts_finite_numbers_above_the_bound_and_nothing_else(value, least, strict):
    inside = math.isfinite(value) and (value > least or (value == least and not strict))
    if inside:
        assert check_at_least("rounds", value, least, strict=strict) == value
    else:
        bound = "above" if strict else "of at least"
        with pytest.raises(InputError) as caught:
            check_at_least("rounds", value, least, strict=strict)
        assert str(caught.value) == f"rounds: got {value!r}; give a finite number {bound} {least}"


def test_checks_keep_integers_as_they_are():
    assert isinstance(check_at_least("rounds", 3, 1), int)
    assert isinstance(check_fraction("share", 1, one=True), int)
