"""Records are selected, paired by seed and drawn as curves; a name that is nowhere is an error."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.core.checks import InputError
from etude.lab.results import Results

RECORDS = [
    {"arm": "ticket", "seed": 1, "remaining": 0.2, "accuracy": 0.8},
    {"arm": "ticket", "seed": 0, "remaining": 0.2, "accuracy": 0.9},
    {"arm": "ticket", "seed": 0, "remaining": 1.0, "accuracy": 0.7, "note": "first"},
    {"arm": "dense", "seed": 0, "remaining": 1.0, "accuracy": 0.6},
]


def test_iterates_and_counts_its_records_and_does_not_change():
    results = Results(record for record in RECORDS)
    assert list(results) == RECORDS
    assert len(results) == 4
    with pytest.raises(AttributeError):
        results.records = ()
    assert results == Results(RECORDS)


def test_select_by_arm_and_coordinates():
    results = Results(RECORDS)
    assert len(results.select()) == 4
    assert list(results.select("ticket", {"remaining": 0.2})) == RECORDS[:2]
    assert list(results.select(where={"remaining": 1})) == RECORDS[2:]
    assert list(results.select(where={"note": "first"})) == RECORDS[2:3]
    assert len(results.select("ticket", {"remaining": 0.2, "seed": 5})) == 0


def test_coordinates_are_equal_despite_rounding_but_not_when_merely_close():
    results = Results([{"arm": "a", "seed": 0, "rate": 0.1 + 0.2, "m": 1.0}])
    assert results.by_seed("m", "a", {"rate": 0.3}) == {0: 1.0}
    assert results.by_seed("m", "a", {"rate": 0.3001}) == {}


def test_by_seed_sorts_seeds_and_averages_repeated_draws():
    results = Results(
        {"arm": "a", "seed": seed, "draw": draw, "m": float(10 * seed + draw)} for draw in (2, 0, 1) for seed in (3, 1)
    )
    assert list(results.by_seed("m", "a").items()) == [(1, 11.0), (3, 31.0)]


def test_by_seed_leaves_out_what_is_none_and_keeps_nan_and_booleans():
    values = [None, math.nan, True]
    results = Results({"arm": "a", "seed": seed, "m": value} for seed, value in enumerate(values))
    found = results.by_seed("m", "a")
    assert found.keys() == {1, 2}
    assert math.isnan(found[1])
    assert found[2] == 1.0


def test_an_arm_without_records_has_no_values():
    assert Results(RECORDS).by_seed("accuracy", "random") == {}
    assert Results([]).by_seed("anything", "any", {"where": 1}) == {}
    assert Results(RECORDS).by_seed("accuracy", "dense", {"remaining": 0.2}) == {}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda r: r.by_seed("acuracy", "ticket"), r"name 'acuracy'.*'ticket'.*did you mean 'accuracy'\?"),
        (lambda r: r.by_seed("accuracy", "ticket", {"remainin": 0.2}), r"'remainin'.*mean 'remaining'\?"),
        (lambda r: r.by_seed("note", "dense"), "no record of arm 'dense' has it; use one of 'accuracy'"),
        (lambda r: r.curves("remaning", "accuracy", "ticket"), r"'remaning'.*mean 'remaining'\?"),
        (lambda r: r.curves("remaining", "acuracy", "ticket"), r"'acuracy'.*mean 'accuracy'\?"),
        (lambda r: r.curves("remaining", "accuracy", "ticket", {"sed": 0}), r"'sed'.*mean 'seed'\?"),
    ],
)
def test_a_misspelled_name_is_an_error_that_names_the_nearest(read, message):
    with pytest.raises(InputError, match=message):
        read(Results(RECORDS))


def test_curves_by_seed_in_the_order_of_seeds():
    assert Results(RECORDS).curves("remaining", "accuracy", "ticket") == {
        0: [(0.2, 0.9), (1.0, 0.7)],
        1: [(0.2, 0.8)],
    }
    assert list(Results(RECORDS).curves("remaining", "accuracy", "ticket")) == [0, 1]
    assert Results(RECORDS).curves("seed", "accuracy", "ticket", {"remaining": 1.0}) == {0: [(0.0, 0.7)]}
    assert Results(RECORDS).curves("remaining", "accuracy", "random") == {}


def test_curves_leave_out_points_without_a_value():
    results = Results(
        [
            {"arm": "a", "seed": 0, "x": 1, "m": 1.0},
            {"arm": "a", "seed": 0, "x": 2, "m": None},
            {"arm": "a", "seed": 0, "x": None, "m": 3.0},
            {"arm": "a", "seed": 0, "m": 4.0},
        ]
    )
    assert results.curves("x", "m", "a") == {0: [(1.0, 1.0)]}


def test_coordinates_are_distinct_and_sorted():
    assert Results(RECORDS).coordinates("remaining") == [0.2, 1.0]
    assert Results(RECORDS).coordinates("remaining", arm="dense") == [1.0]
    assert Results(RECORDS).coordinates("note") == ["first"]
    assert Results(RECORDS).coordinates("nothing") == []


@given(st.permutations(RECORDS))
def test_the_order_of_records_does_not_matter(records):
    expected, found = Results(RECORDS), Results(records)
    assert found.by_seed("accuracy", "ticket") == expected.by_seed("accuracy", "ticket")
    assert list(found.by_seed("accuracy", "ticket")) == [0, 1]
    assert found.coordinates("remaining") == expected.coordinates("remaining")
