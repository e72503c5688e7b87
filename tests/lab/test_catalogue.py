"""Studies are found through entry points; one that is broken takes no other down."""

from importlib.metadata import EntryPoint

import plain_study
import pytest

from etude.core.checks import InputError
from etude.lab import catalogue
from etude.lab.catalogue import UnknownStudyError, listings, load


@pytest.fixture
def provided(monkeypatch, tmp_path):
    """A function that makes modules of given sources, and entry points of given names into them."""
    monkeypatch.syspath_prepend(tmp_path)

    def provide(*entries):
        points = []
        for name, value, source in entries:
            if source is not None:
                (tmp_path / f"{value.partition(':')[0]}.py").write_text(source)
            points.append(EntryPoint(name, value, catalogue.GROUP))
        monkeypatch.setattr(catalogue, "entry_points", lambda group: points)

    return provide


def test_a_listing_is_read_without_importing(provided):
    source = (
        "raise RuntimeError('imported')\n"
        "study = Study(slug='s', paper=Paper(title='A' ' title', year=2021), method='etude.compress.prune')\n"
        "def later():\n    return Paper(title='another')\n"
    )
    provided(("quiet", "quiet_module:study", source))
    (found,) = listings()
    assert (found.slug, found.title, found.year, found.theme, found.error) == ("quiet", "A title", 2021, "compress", "")


def test_a_paper_described_before_the_study_is_read_too(provided):
    source = (
        "raise RuntimeError('imported')\n\n\nPAPER = Paper(title='Before', year=2020)\n\n\n"
        "study = Study(slug='s', paper=PAPER, method='package.module')\n"
    )
    provided(("quiet", "earlier_module:study", source))
    (found,) = listings()
    assert (found.title, found.theme, found.error) == ("Before", "package", "")


def test_what_is_not_written_out_is_imported(provided):
    source = "import dataclasses, plain_study\nstudy = dataclasses.replace(plain_study.study, slug='made')\n"
    provided(("made", "made_module:study", source))
    (found,) = listings()
    assert (found.title, found.theme) == ("A plain <em>study</em>", "core")


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        ("import no_such_package\n", "m1:study", "cannot be imported"),
        ("def broken(:\n", "m2:study", "invalid syntax"),
        ("", "m3:study", "cannot be imported"),
        ("study = 3\n", "m4:study", "its entry point gives 'int'"),
        (None, "no_such_module:study", "no module no_such_module"),
    ],
)
def test_one_that_is_broken_is_listed_with_its_error(provided, source, value, message):
    provided(("broken", value, source), ("plain", "plain_study:study", None))
    broken, plain = listings()
    assert message in broken.error
    assert plain.title == "A plain <em>study</em>"
    with pytest.raises(InputError, match="study 'broken'"):
        load("broken")
    assert load("plain") is plain_study.study


def test_an_entry_point_under_another_name_than_the_studys_is_refused(provided):
    provided(("other", "plain_study:study", None))
    with pytest.raises(InputError, match="gives 'plain'; point it at a Study whose slug"):
        load("other")


def test_two_packages_cannot_provide_the_same_study(provided):
    provided(("plain", "plain_study:study", None), ("plain", "rival:study", "study = 1\n"))
    with pytest.raises(InputError, match="provided more than once, by plain_study:study and rival:study"):
        load("plain")
    assert len(listings()) == 1


def test_an_unknown_name_is_an_error_with_the_nearest(provided):
    provided(("plain", "plain_study:study", None))
    with pytest.raises(UnknownStudyError, match="unknown paper 'plian'; did you mean 'plain'"):
        load("plian")
