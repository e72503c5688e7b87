"""The report: complete, escaped, self-contained, and the same bytes for the same results."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import plain_study
import pytest

from etude.lab import run
from etude.lab.report import build
from etude.lab.store import Store

STUDIES = {"plain": plain_study.study}


@pytest.fixture
def folder(tmp_path):
    run(plain_study.study, results=tmp_path, workers=1)
    return tmp_path


class Links(HTMLParser):
    """Collects what a page loads and links to."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("href", "src")]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_claim_and_verdict_is_shown(folder):
    front = build(folder, STUDIES).read_text()
    page = (folder / "report" / "plain.html").read_text()
    for text in (front, page):
        assert "reproduced" in text
        assert "not reproduced" in text
        assert text.count('class="interval"') == 2
    assert "from x import y" in page
    assert "The 2 parts of the rule" in page
    assert "points" in page
    assert "torch" in page


def test_whatever_is_printed_is_escaped(folder, monkeypatch):
    monkeypatch.setenv("PLAIN_STUDY_FAILS", "baseline")
    run(plain_study.study, results=folder, workers=1, fresh=True)
    build(folder, STUDIES)
    for name in ("index.html", "plain.html"):
        text = (folder / "report" / name).read_text()
        for hostile in ("<em>study", "<better>", "<here>", "<unsafe>", "<i>&", "<script>", "<b>the arm failed"):
            assert hostile not in text
    assert "&lt;b&gt;the arm failed" in (folder / "report" / "plain.html").read_text()


def test_nothing_is_loaded_and_links_resolve(folder):
    build(folder, STUDIES)
    for page in (folder / "report").glob("*.html"):
        links = Links(page.read_text())
        assert not {"script", "iframe", "object"} & set(links.tags)
        for target in links.found:
            if not target.startswith(("#", "data:,")):
                assert (page.parent / target).exists(), target


def test_ids_are_unique_on_a_page(folder):
    build(folder, STUDIES)
    ids = re.findall(r'\bid="([^"]+)"', (folder / "report" / "plain.html").read_text())
    assert len(ids) == len(set(ids))


def test_the_figure_is_well_formed_and_named(folder):
    build(folder, STUDIES)
    drawing = ElementTree.parse(folder / "report" / "figures" / "plain.svg").getroot()
    assert drawing.get("role") == "img"
    assert "study" in drawing.get("aria-label")


def test_the_same_results_give_the_same_bytes(folder):
    build(folder, STUDIES)
    first = files(folder / "report")
    build(folder, STUDIES, folder / "again")
    assert files(folder / "again") == first


def test_the_committed_forms_say_the_same(folder):
    build(folder, STUDIES)
    (entry,) = json.loads((folder / "report" / "verdicts.json").read_text())
    assert [claim["verdict"] for claim in entry["claims"]] == ["reproduced", "not reproduced"]
    assert entry["seeds"] == [0, 1, 2, 3]
    text = (folder / "report" / "index.md").read_text()
    assert "| C1 | reproduced |" in text
    assert "C2: It is not large" in text
    assert (folder / "report" / "records" / "plain.csv").read_text().startswith("study,preset,run,arm,seed")


def test_smoke_is_shown_without_verdicts(tmp_path):
    run(plain_study.study, preset="smoke", results=tmp_path, workers=1)
    text = build(tmp_path, STUDIES).read_text()
    assert "not judged" in text
    assert "proves that it runs" in text


def test_small_is_preferred_to_a_newer_smoke(folder):
    run(plain_study.study, preset="smoke", results=folder, workers=1)
    assert "Preset small" in build(folder, STUDIES).read_text()


def test_a_study_no_longer_installed_is_shown_as_stored(folder):
    build(folder, {})
    assert "not installed here" in (folder / "report" / "plain.html").read_text()


def test_an_empty_folder_says_what_to_run(tmp_path):
    Store(tmp_path, write=True).close()
    assert "etude run all" in build(tmp_path, STUDIES).read_text()
