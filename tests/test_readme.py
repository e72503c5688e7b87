"""The README says what the committed results say, and its pictures and links are there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERDICTS = json.loads((ROOT / "docs" / "results" / "verdicts.json").read_text(encoding="utf-8"))
STUDIES = {page["study"] for page in VERDICTS}


def cells(width):
    """The README's table rows that begin with a study and have so many columns."""
    found = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| `")]
    return [(row[0].strip("`"), *row[1:]) for row in found if len(row) == width and row[0].strip("`") in STUDIES]


def shown(claim):
    """A claim's effect and interval to three digits."""
    return f"{claim['effect']:.3g} [{claim['interval'][0]:.3g}, {claim['interval'][1]:.3g}]"


def test_every_claim_is_counted_under_its_verdict():
    kinds = ("reproduced", "not reproduced", "inconclusive", "not measured")
    expected = {
        (page["study"], *(", ".join(c["id"] for c in page["claims"] if c["verdict"] == kind) or "-" for kind in kinds))
        for page in VERDICTS
    }
    assert expected <= set(cells(5))
    assert len(expected) == len(VERDICTS)


def test_the_claims_shown_are_those_of_the_results():
    found = [
        row
        for row in cells(5)
        if re.fullmatch(r"C\w+", row[1]) and row[3] in ("reproduced", "not reproduced", "inconclusive")
    ]
    expected = {
        (page["study"], claim["id"], claim["statement"], claim["verdict"], shown(claim))
        for page in VERDICTS
        for claim in page["claims"]
        if claim["effect"] is not None
    }
    assert len(found) > 10
    assert set(found) <= expected


def test_results_are_of_small_and_several_seeds():
    assert {"lottery-ticket", "gradient-noise", "convergent-learning"} <= {page["study"] for page in VERDICTS}
    for page in VERDICTS:
        assert page["preset"] == "small"
        assert len(page["seeds"]) >= 3


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_within_the_repository_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (ROOT / target).exists(), f"{name}: {target}"
