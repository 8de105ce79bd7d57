"""Short stories of people, places and things with a question of one word, like the first five tasks of bAbI.

The world is our own, and so are the texts; the kinds of facts and questions are those of bAbI (arXiv 1502.05698):

1. one supporting fact: people move, and it is asked where somebody is;
2. two: people carry things too, and it is asked where a thing is;
3. three: it is asked where a thing was before it was somewhere else;
4. relations of two: a place is north, south, east or west of another, and one of them is asked for;
5. relations of three: somebody gives a thing to somebody, and one of the three is asked for.

Where something happened more than once, it is the last time that counts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
THINGS = ("football", "apple", "milk")
MOVES = ("moved", "went", "travelled", "journeyed")
TAKES = ("took", "got", "grabbed")
DROPS = ("dropped", "discarded", "left")
GIVES = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
FACTS = {1: (2, 10), 2: (4, 16), 3: (8, 24), 4: (2, 2), 5: (4, 16)}
"""Fewest and most facts of a story, by kind of question."""


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts in order, a question about them and its answer, one word."""

    facts: tuple[str, ...]
    question: str
    answer: str


def story(kind: int, rng: np.random.Generator) -> Story:
    """A random story with a question of a kind, 1 to 5."""
    if kind == 4:
        return _relations(rng)
    low, high = FACTS[kind]
    while True:
        count = int(rng.integers(low, high + 1))
        world = _World(rng)
        while len(world.facts) < count:
            world.go_on(carry=kind > 1, give=kind == 5)
        asked = {1: world.ask_person, 2: world.ask_thing, 3: world.ask_before, 5: world.ask_gift}[kind]()
        if asked is not None:
            return Story(tuple(world.facts), *asked)


def longest_sentences(kind: int) -> tuple[str, str, str]:
    """A fact, a question and an answer as long as those of a kind can be, in letters."""
    person, place, thing = (max(words, key=len) for words in (PEOPLE, PLACES, THINGS))
    facts = [f"{person} {verb} to the {place}." for verb in MOVES]
    if kind == 4:
        return f"The {place} is north of the {place}.", f"What is the {place} north of?", place
    if kind > 1:
        facts += [f"{person} {verb} the {thing}." for verb in (*TAKES, *DROPS)]
    if kind == 5:
        facts += [f"{person} {verb} the {thing} to {person}." for verb in GIVES]
    question = {
        1: f"Where is {person}?",
        2: f"Where is the {thing}?",
        3: f"Where was the {thing} before the {place}?",
        5: f"Who did {person} give the {thing} to?",
    }[kind]
    return max(facts, key=len), question, max(person, place, thing, key=len)


def _pick(rng: np.random.Generator, words: Sequence[T]) -> T:
    return words[int(rng.integers(len(words)))]


class _World:
    """Who is where and has what, and what has been told of it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.facts: list[str] = []
        self.place: dict[str, str] = {}  # of people
        self.holder: dict[str, str] = {}  # of things that somebody has
        self.been: dict[str, list[str]] = {}  # places of each thing that was ever taken, in order
        self.gifts: list[tuple[str, str, str]] = []  # who gave what to whom

    def go_on(self, carry: bool, give: bool) -> None:
        """One more fact."""
        acts: list[Callable[[], None]] = [self._move]
        if carry:
            acts += [act for act, possible in ((self._take, self._takes()), (self._drop, self.holder)) if possible]
        if give and self._gives():
            acts += [self._give, self._give]  # what is asked about comes more often
        _pick(self.rng, acts)()

    def _move(self) -> None:
        person = _pick(self.rng, PEOPLE)
        place = _pick(self.rng, [place for place in PLACES if place != self.place.get(person)])
        self.place[person] = place
        for thing, holder in self.holder.items():
            if holder == person:
                self.been[thing].append(place)
        self.facts.append(f"{person} {_pick(self.rng, MOVES)} to the {place}.")

    def _takes(self) -> list[tuple[str, str]]:
        """Who could take what: it lies there, or nobody has told yet where it is."""
        free = [thing for thing in THINGS if thing not in self.holder]
        return [
            (person, thing)
            for person, place in self.place.items()
            for thing in free
            if thing not in self.been or self.been[thing][-1] == place
        ]

    def _take(self) -> None:
        person, thing = _pick(self.rng, self._takes())
        self.holder[thing] = person
        self.been.setdefault(thing, [self.place[person]])
        self.facts.append(f"{person} {_pick(self.rng, TAKES)} the {thing}.")

    def _drop(self) -> None:
        thing = _pick(self.rng, sorted(self.holder))
        self.facts.append(f"{self.holder.pop(thing)} {_pick(self.rng, DROPS)} the {thing}.")

    def _gives(self) -> list[tuple[str, str, str]]:
        """Who could give what to whom: both are at one place."""
        return [
            (holder, thing, person)
            for thing, holder in self.holder.items()
            for person, place in self.place.items()
            if person != holder and place == self.place[holder]
        ]

    def _give(self) -> None:
        gift = giver, thing, person = _pick(self.rng, self._gives())
        self.holder[thing] = person
        self.gifts.append(gift)
        self.facts.append(f"{giver} {_pick(self.rng, GIVES)} the {thing} to {person}.")

    def ask_person(self) -> tuple[str, str] | None:
        person = _pick(self.rng, sorted(self.place))
        return f"Where is {person}?", self.place[person]

    def ask_thing(self) -> tuple[str, str] | None:
        if not self.been:
            return None
        thing = _pick(self.rng, sorted(self.been))
        return f"Where is the {thing}?", self.been[thing][-1]

    def ask_before(self) -> tuple[str, str] | None:
        """A thing and a place where it was once, and not first."""
        found = [
            (f"Where was the {thing} before the {place}?", before)
            for thing, places in sorted(self.been.items())
            for before, place in itertools.pairwise(places)
            if places.count(place) == 1
        ]
        return _pick(self.rng, found) if found else None

    def ask_gift(self) -> tuple[str, str] | None:
        if not self.gifts:
            return None
        giver, thing, person = _pick(self.rng, self.gifts)
        form = int(self.rng.integers(5))
        question, known, wanted = (
            (f"What did {giver} give to {person}?", (giver, None, person), 1),
            (f"Who gave the {thing} to {person}?", (None, thing, person), 0),
            (f"Who did {giver} give the {thing} to?", (giver, thing, None), 2),
            (f"Who gave the {thing}?", (None, thing, None), 0),
            (f"Who received the {thing}?", (None, thing, None), 2),
        )[form]
        fit = [
            gift
            for gift in self.gifts
            if all(want is None or want == have for want, have in zip(known, gift, strict=True))
        ]
        return question, fit[-1][wanted]


def _relations(rng: np.random.Generator) -> Story:
    """Two places in different directions from a third, and a question about one of the two facts."""
    middle, *others = (PLACES[number] for number in rng.permutation(len(PLACES))[:3])
    facts = []
    for place, number in zip(others, rng.permutation(len(OPPOSITE))[:2], strict=True):
        direction = tuple(OPPOSITE)[number]
        told = (place, direction, middle) if rng.integers(2) else (middle, OPPOSITE[direction], place)
        facts.append(told)
    first, direction, second = _pick(rng, facts)
    texts = tuple(f"The {a} is {where} of the {b}." for a, where, b in facts)
    if rng.integers(2):
        return Story(texts, f"What is {direction} of the {second}?", first)
    return Story(texts, f"What is the {first} {direction} of?", second)
