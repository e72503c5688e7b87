"""Every measurement as one table, whatever it holds."""

import csv
import json
import math

import plain_study
import pytest
from pyarrow import parquet

from etude.lab import run
from etude.lab.export import table, write_table
from etude.lab.store import Store


@pytest.fixture
def runs(tmp_path):
    run(plain_study.study, results=tmp_path / "results", workers=1, seeds=2)
    with Store(tmp_path / "results", write=True) as store:
        (stored,) = store.runs()
        records = [
            {"arm": "method", "seed": 7, "value": math.inf, "text": 3, "extra": True, "count": 2},
            {"arm": "method", "seed": 7, "value": math.nan, "text": "a,b", "count": 2.5},
        ]
        store.save("x", run=stored.config_digest, arm="method", seed=7, seconds=1.0, now="now", records=records)
        return store.runs()


def test_a_row_a_record(runs):
    rows = table(runs)
    assert len(rows) == 14
    assert {row["study"] for row in rows} == {"plain"}
    assert {row["run"] for row in rows} == {runs[0].config_digest[:12]}


def test_csv(runs, tmp_path):
    with write_table(runs, "csv", tmp_path / "deep" / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert [row["text"] for row in rows if row["seed"] == "7"] == ["3", "a,b"]
    assert rows[0]["extra"] == ""


def test_json_is_strict(runs, tmp_path):
    def refuse(name):
        raise AssertionError(name)

    rows = json.loads(write_table(runs, "json", tmp_path / "t.json").read_text(), parse_constant=refuse)
    assert [row["value"] for row in rows if row["seed"] == 7] == [None, None]


def test_parquet_columns_have_one_type(runs, tmp_path):
    found = parquet.read_table(write_table(runs, "parquet", tmp_path / "t.parquet"))
    rows = found.to_pylist()
    assert [row["text"] for row in rows if row["seed"] == 7] == ["3", "a,b"]
    assert [row["count"] for row in rows if row["seed"] == 7] == [2.0, 2.5]
    assert next(row["value"] for row in rows if row["seed"] == 7) == math.inf
    assert rows[0]["extra"] is None


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_nothing_measured_is_an_empty_table(kind, tmp_path):
    assert write_table([], kind, tmp_path / f"t.{kind}").exists()
