"""Generated stories hold together: a reader who follows them sentence by sentence gets the same answers."""

import pytest
import torch
from scipy import stats

from etude import data
from etude.core.checks import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def follow(text):
    """The answer by following a story's text; raises if something impossible is told."""
    *told, question = text.splitlines()
    asked, answer = question.removeprefix("where is ").split("? ")
    at, carrier, lying = {}, {}, {}
    for sentence in told:
        who, verb, what = sentence.split()
        if verb == "went":
            assert at.get(who) != what, "nobody goes where they are"
            at[who] = what
        elif verb == "took":
            assert what not in carrier
            assert lying.get(what, at[who]) == at[who], "a thing is taken where it lies"
            carrier[what] = who
        else:
            assert carrier.pop(what) == who, "only the carrier drops it"
            lying[what] = at[who]
    known = at.get(asked) or (at[carrier[asked]] if asked in carrier else lying.get(asked))
    return known, answer


@pytest.mark.parametrize(
    "settings",
    [
        {"facts": 1, "statements": 3},
        {"facts": 1, "people": 1, "places": 2, "statements": 1},
        {"facts": 2},
        {"facts": 2, "statements": 20, "people": 8, "places": 8, "objects": 8},
        {"facts": 2, "statements": 4, "people": 1, "places": 2, "objects": 1},
    ],
)
def test_the_answer_follows_from_the_story(settings):
    told = data.tell_stories(300, generator(), **settings)
    assert len(told) == 300
    for row in range(300):
        known, answer = follow(told.text(row))
        assert known == answer


def test_shapes_words_and_the_blank():
    told = data.tell_stories(50, generator(), statements=6, people=3, places=5, objects=2)
    assert told.sentences.shape == (50, 7, 3)
    assert told.vocabulary[0] == ""
    assert len(told.vocabulary) == len(set(told.vocabulary)) == 1 + 3 + 3 + 5 + 2 + 2
    assert told.sentences.min() > 0
    assert told.sentences.max() < len(told.vocabulary)
    assert {told.vocabulary[index] for index in told.answers.tolist()} <= set(told.vocabulary[7:12])


def test_answers_are_even_and_two_facts_are_needed():
    told = data.tell_stories(8000, generator())
    counts = told.answers.bincount()
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-4
    verbs = {told.vocabulary.index(word) for word in ("took", "dropped")}
    assert all(any(int(line[1]) in verbs for line in story[:-1]) for story in told.sentences[:200])
    # Neither the last place told nor the question's last mention alone gives the answer.
    places = told.sentences[:, :-1, 2]
    is_place = (places >= 8) & (places < 12)
    last = places.gather(1, (is_place * torch.arange(1, 9)).argmax(1, keepdim=True)).squeeze(1)
    assert 0.3 < (last == told.answers).float().mean() < 0.6


def test_the_seed_decides_and_the_global_generator_is_untouched():
    outer = torch.get_rng_state()
    first, second, other = (data.tell_stories(40, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.sentences, second.sentences)
    assert torch.equal(first.answers, second.answers)
    assert not torch.equal(first.sentences, other.sentences)
    assert torch.equal(torch.get_rng_state(), outer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts": 3}, "facts"),
        ({"statements": 3}, "statements"),
        ({"facts": 1, "statements": 0}, "statements"),
        ({"people": 0}, "people: got 0; give 1 to 8"),
        ({"places": 1}, "places: got 1; give 2 to 8"),
        ({"objects": 9}, "objects: got 9; give 1 to 8"),
    ],
)
def test_unusable_sizes(settings, message):
    with pytest.raises(InputError, match=message):
        data.tell_stories(5, generator(), **settings)
    with pytest.raises(InputError, match="rows"):
        data.tell_stories(0, generator())
