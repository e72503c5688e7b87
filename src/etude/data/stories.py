"""Generated stories that end in a question about a place, after the bAbI tasks 1 and 2 (Weston et al., 2015)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from etude.core.checks import InputError, check_at_least, check_one_of

__all__ = ["Stories", "tell_stories"]

PEOPLE = ("mary", "john", "sandra", "daniel", "bill", "julie", "fred", "jeff")
PLACES = ("kitchen", "garden", "hallway", "office", "bedroom", "bathroom", "park", "school")
OBJECTS = ("football", "milk", "apple", "book", "box", "cup", "lamp", "hat")
VERBS = ("went", "took", "dropped")
QUESTION = ("where", "is")
WENT, TOOK, DROPPED = range(3)
NOWHERE = -1


@dataclass(frozen=True)
class Stories:
    """Stories with their questions, as word indices; index 0 is the blank that no word has.

    Args:
        sentences: ``(rows, statements + 1, 3)``: each statement as subject, verb, place or object, in the order in
            which things happened; the last sentence is the question.
        answers: the place asked for, as a word index, ``(rows,)``.
        vocabulary: the words, by index.
    """

    sentences: Int64[Tensor, "rows sentences words"]
    answers: Int64[Tensor, "rows"]
    vocabulary: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.answers)

    def to(self, device: torch.device | str) -> "Stories":
        """The same stories on another device."""
        return Stories(self.sentences.to(device), self.answers.to(device), self.vocabulary)

    def text(self, row: int) -> str:
        """One story as text, a line a sentence, with its answer."""
        lines = [" ".join(self.vocabulary[index] for index in line) for line in self.sentences[row].tolist()]
        return "\n".join([*lines[:-1], f"{lines[-1]}? {self.vocabulary[int(self.answers[row])]}"])


def tell_stories(
    rows: int,
    generator: torch.Generator,
    *,
    facts: int = 2,
    statements: int = 8,
    people: int = 4,
    places: int = 4,
    objects: int = 3,
) -> Stories:
    """Generate stories, each with one question whose answer follows from ``facts`` of its statements.

    With one fact, people walk about and the question asks where a person is. With two, they also pick up and drop
    objects and the question asks where an object is: who has it, and where that person went since (or, once it was
    dropped, where its carrier was then). Function words are left out: a sentence has three words.

    Args:
        rows: stories.
        generator: CPU generator.
        facts: 1 (bAbI's "single supporting fact") or 2 ("two supporting facts").
        statements: statements a story; at least 4 where two facts are needed.
        people: how many people, 1 to 8.
        places: how many places, 2 to 8.
        objects: how many objects, 1 to 8; unused with one fact.

    Raises:
        InputError: for sizes outside these bounds.

    Weston et al., Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks, 2015.

    >>> print(tell_stories(1, torch.Generator().manual_seed(3), statements=4).text(0))
    sandra went kitchen
    mary went office
    sandra took football
    john went kitchen
    where is football? kitchen
    """
    _check_sizes(rows, facts, statements, people, places, objects)
    vocabulary = ("", *PEOPLE[:people], *VERBS, *PLACES[:places], *OBJECTS[:objects], *QUESTION)
    found: list[tuple[Tensor, Tensor]] = []
    while sum(len(answers) for _, answers in found) < rows:
        world = _World(rows, people, places, objects, facts, generator)
        lines = torch.stack([world.advance() for _ in range(statements)], 1)
        question, answers, known = world.ask()
        found.append((torch.cat([lines, question.unsqueeze(1)], 1)[known], answers[known]))
    sentences, answers = (torch.cat(parts)[:rows] for parts in zip(*found, strict=True))
    return Stories(sentences, answers, vocabulary)


class _World:
    """The state of many stories at once: where everybody is, who carries what, and where the objects lie."""

    def __init__(self, rows: int, people: int, places: int, objects: int, facts: int, generator: torch.Generator):
        self.rows, self.people, self.places, self.objects = torch.arange(rows), people, places, objects
        self.facts, self.generator = facts, generator
        self.location = torch.full((rows, people), NOWHERE)
        self.carrier = torch.full((rows, objects), NOWHERE)
        self.lying = torch.full((rows, objects), NOWHERE)
        self.first_verb = 1 + people
        self.first_place = self.first_verb + len(VERBS)
        self.first_object = self.first_place + places
        self.first_question = self.first_object + objects

    def advance(self) -> Int64[Tensor, "rows words"]:
        """Let one random thing happen in every story and tell it."""
        person, thing = self._draw(self.people), self._draw(self.objects)
        here, verb = self.location[self.rows, person], self._verb(person, thing)
        step = 1 + self._draw(self.places - 1)
        place = torch.where(here == NOWHERE, self._draw(self.places), (here + step) % self.places)
        went, took, dropped = (verb == each for each in (WENT, TOOK, DROPPED))
        self.location[self.rows[went], person[went]] = place[went]
        self.carrier[self.rows[took], thing[took]] = person[took]
        self.carrier[self.rows[dropped], thing[dropped]] = NOWHERE
        self.lying[self.rows[dropped], thing[dropped]] = here[dropped]
        last = torch.where(went, self.first_place + place, self.first_object + thing)
        return torch.stack([1 + person, self.first_verb + verb, last], 1)

    def _verb(self, person: Int64[Tensor, "rows"], thing: Int64[Tensor, "rows"]) -> Int64[Tensor, "rows"]:
        """What the person does: walk in half of the cases; drop the thing if they have it, or take it if they can."""
        here = self.location[self.rows, person]
        carrier, lying = self.carrier[self.rows, thing], self.lying[self.rows, thing]
        # A thing never seen yet is taken to lie wherever somebody finds it.
        takes = (carrier == NOWHERE) & (here != NOWHERE) & ((lying == NOWHERE) | (lying == here))
        other = torch.where(carrier == person, DROPPED, torch.where(takes, TOOK, WENT))
        walks = self._draw(2) == 0 if self.facts == 2 else torch.ones_like(takes)
        return torch.where(walks, WENT, other)

    def ask(self) -> tuple[Int64[Tensor, "rows words"], Int64[Tensor, "rows"], Bool[Tensor, "rows"]]:
        """A question for every story, its answer, and whether the story tells the answer."""
        if self.facts == 1:
            asked = self._draw(self.people)
            place, word = self.location[self.rows, asked], 1 + asked
        else:
            asked = self._draw(self.objects)
            carrier = self.carrier[self.rows, asked]
            carried = self.location[self.rows, carrier.clamp(min=0)]
            place = torch.where(carrier == NOWHERE, self.lying[self.rows, asked], carried)
            word = self.first_object + asked
        where, is_ = torch.full_like(word, self.first_question), torch.full_like(word, self.first_question + 1)
        return torch.stack([where, is_, word], 1), self.first_place + place, place != NOWHERE

    def _draw(self, options: int) -> Int64[Tensor, "rows"]:
        return torch.randint(options, (len(self.rows),), generator=self.generator)


def _check_sizes(rows: int, facts: int, statements: int, people: int, places: int, objects: int) -> None:
    check_at_least("rows", rows, 1)
    check_one_of("facts", str(facts), ("1", "2"))
    check_at_least("statements", statements, 1 if facts == 1 else 4)
    for name, value, least in (("people", people, 1), ("places", places, 2), ("objects", objects, 1)):
        if not least <= value <= len(PEOPLE):
            raise InputError(f"got {value}", where=name, instead=f"give {least} to {len(PEOPLE)}")
