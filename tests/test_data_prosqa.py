"""Questions about graphs of classes against a reader and a graph search of their own."""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest

from experiments.data import Batches, DataError
from experiments.data.prosqa import NAMES, ProsqaData
from experiments.data.questions import QuestionBatches

SMALL = {"samples": 100, "test_samples": 30, "batch_size": 8}
SENTENCE = re.compile(r"(?:Every (\w+)|([A-Z]\w+)) is a (\w+) \.")
QUESTION = re.compile(r"Is (\w+) a (\w+) or (\w+) \?")


class Story(NamedTuple):
    """A sample as its text tells it."""

    facts: list[tuple[str, str]]
    asked: str
    options: list[str]
    reasoning: list[tuple[str, str]]
    answer: tuple[str, str]
    level: int


def sentences(text):
    """Who or what is what, in order; nothing else is in the text."""
    assert SENTENCE.sub("", text).strip() == ""
    return [(every or name, thing) for every, name, thing in SENTENCE.findall(text)]


def stories(split="train", **settings):
    task = ProsqaData(**{**SMALL, **settings}).task()
    rows = task.questions(split)
    found = []
    for ids, end, level in zip(rows.ids, rows.ends, rows.level, strict=True):
        text = task.tokenizer.decode(ids[:end])
        assert text.endswith(" <eos>")
        (question,) = QUESTION.finditer(text)
        *reasoning, answer = sentences(text[question.end() :].removesuffix("<eos>"))
        asked, *options = question.groups()
        found.append(Story(sentences(text[: question.start()]), asked, options, reasoning, answer, int(level)))
    return found


def distances(story, start):
    """Steps from somebody to all that they are, by breadth-first search."""
    below = defaultdict(list)
    for subject, thing in story.facts:
        below[subject].append(thing)
    steps, edge = {start: 0}, [start]
    while edge:
        edge = [thing for subject in edge for thing in below[subject] if thing not in steps]
        steps |= {thing: max(steps.values()) + 1 for thing in edge}
    return steps


def people(story):
    """The person who is asked about, and the other one."""
    (other,) = {subject for subject, _ in story.facts if subject in NAMES} - {story.asked}
    return story.asked, other


def right_and_wrong(story):
    right = story.answer[1]
    (wrong,) = set(story.options) - {right}
    return right, wrong


@pytest.fixture(scope="module")
def many():
    return stories(samples=600)


def test_exactly_one_option_can_be_reached(many):
    for story in many:
        reached = distances(story, story.asked)
        assert story.answer[0] == story.asked
        assert [option in reached for option in right_and_wrong(story)] == [True, False]


def test_the_reasoning_is_a_shortest_way_along_facts(many):
    assert {story.level for story in many} == {2, 3, 4}
    for story in many:
        assert set(story.reasoning) <= set(story.facts)
        assert story.reasoning[0][0] == story.asked
        assert all(a[1] == b[0] for a, b in zip(story.reasoning, story.reasoning[1:], strict=False))
        assert story.reasoning[-1][1] == story.answer[1]
        assert len(story.reasoning) == story.level == distances(story, story.asked)[story.answer[1]]


def test_asked_about_the_other_person_the_answer_is_the_other_option_as_many_steps_down(many):
    """So facts and options alone do not tell what is right, however they are looked at."""
    for story in many:
        _, other = people(story)
        right, wrong = right_and_wrong(story)
        reached = distances(story, other)
        assert right not in reached
        assert reached[wrong] == story.level


def test_facts_are_a_graph_without_circles_and_each_stands_once(many):
    for story in many:
        assert len(set(story.facts)) == len(story.facts) <= 24
        things = {thing for _, thing in story.facts}
        assert len(things) == 16
        for thing in things:
            below = distances(story, thing)
            assert not any(subject in below and result == thing for subject, result in story.facts)
        assert all(subject in things or subject in people(story) for subject, _ in story.facts)


def signs(count, of):
    """Whether a count is what fair coins give, within four standard deviations."""
    return abs(count - of / 2) < 4 * np.sqrt(of) / 2


def test_the_place_of_the_option_says_nothing(many):
    first = sum(story.options[0] == story.answer[1] for story in many)
    assert signs(first, len(many))


# What a reader might guess by without following the way: the option with more of it is taken to be right.
GUESSES = {
    "is mentioned more often": lambda story, option: sum(option in fact for fact in story.facts),
    "is told of later": lambda story, option: max(i for i, fact in enumerate(story.facts) if option in fact),
    "has more above it": lambda story, option: sum(thing == option for _, thing in story.facts),
    "has more below it": lambda story, option: sum(subject == option for subject, _ in story.facts),
    "stands nearer to the person": lambda story, option: (
        -min(
            abs(i - j)
            for i, (subject, _) in enumerate(story.facts)
            for j, fact in enumerate(story.facts)
            if subject == story.asked and option in fact
        )
    ),
    "comes first in the alphabet": lambda story, option: option < max(story.options),
}


@pytest.mark.parametrize("guess", GUESSES.values(), ids=GUESSES.keys())
def test_no_shortcut(many, guess):
    right = trials = 0
    for story in many:
        good, bad = (guess(story, option) for option in right_and_wrong(story))
        right, trials = right + (good > bad), trials + (good != bad)
    assert trials > 300
    assert signs(right, trials)


def test_people_are_alike(many):
    """The asked person has as many facts as the other one, and is as often told of first."""
    more = first = different = 0
    for story in many:
        asked, other = ([i for i, (subject, _) in enumerate(story.facts) if subject == who] for who in people(story))
        more, different = more + (len(asked) > len(other)), different + (len(asked) != len(other))
        first += asked[0] < other[0]
    assert signs(more, different)
    assert signs(first, len(many))


def test_each_person_has_a_branch_and_some_classes_are_below_both(many):
    reached = [[set(distances(story, person)) for person in people(story)] for story in many]
    mine, others, both = (
        np.mean([len(part(*sets)) for sets in reached])
        for part in (set.difference, lambda a, b: b - a, set.intersection)
    )
    assert mine > 6
    assert others == pytest.approx(mine, rel=0.1)
    assert both > 1


def test_questions_are_different_and_in_one_split():
    sets = {}
    for split in ("train", "test"):
        for seed in (0, 1):
            told = [repr(story[:3]) for story in stories(split, seed=seed)]
            assert len(set(told)) == len(told) == 3 * SMALL["samples" if split == "train" else "test_samples"]
            sets[split, seed] = told
    assert sets["test", 0] == sets["test", 1]
    assert sets["train", 0] != sets["train", 1]
    assert not (set(sets["train", 0]) | set(sets["train", 1])) & set(sets["test", 0])


def test_same_settings_same_questions():
    one, two = ([next(QuestionBatches(ProsqaData(**SMALL)))["tokens"] for _ in range(2)] for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("classes", [8, 16, 25])
def test_rows(classes):
    config = ProsqaData(**SMALL, steps=(2, 3), classes=classes)
    task = config.task()
    rows = task.questions("train")
    assert rows.ids.shape[1] == config.length + 1
    assert config.length * 0.85 < rows.ends.max() <= config.length + 1
    batch = rows.batch()
    mark, end = task.tokenizer.ids["?"], task.tokenizer.separator
    for tokens, targets, weights in zip(*batch.values(), strict=True):
        first, last = tokens.tolist().index(mark), targets.tolist().index(end)
        assert weights.tolist() == [float(first <= place <= last) for place in range(config.length)]
        assert (targets[last:] == end).all()
    data = QuestionBatches(config)
    assert isinstance(data, Batches)
    assert next(data)["tokens"].shape == (8, config.length)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Ada is a bampus . Every bampus is a bilpus . Ada is a bilpus . <eos>", "bilpus"),
        ("Ada is a bilpus . <eos>", "bilpus"),
        ("or . Tom is a bilpus . <eos>", "bilpus"),
        ("Ada is a bilpus .", None),
        ("Ada is a bilpus <eos>", None),
        ("Every bampus is a bilpus . <eos>", None),
        ("bampus is a bilpus . <eos>", None),
        ("Ada is a Ada . <eos>", None),
        ("Ada is bilpus . <eos>", None),
        ("Every Ada is a bilpus . <eos>", None),
        ("<eos>", None),
        ("", None),
    ],
)
def test_the_answer_of_a_text(text, answer):
    task = ProsqaData().task()
    assert task.answer(task.tokenizer.encode(text)) == (answer and task.tokenizer.ids[answer])


def test_an_answer_with_ids_beyond_the_vocabulary_is_malformed():
    assert ProsqaData().task().answer(np.full(9, 1000)) is None


def test_tokenizer():
    tokenizer = ProsqaData().task().tokenizer
    text = "Is Ada a bampus or bilpus ? Every bampus is a bilpus . <eos>"
    assert tokenizer.decode(tokenizer.encode(text.replace(" ?", "?").replace(" .", "."))) == text
    with pytest.raises(DataError, match="prosqa task has no 'wumpus'"):
        tokenizer.encode("Ada is a wumpus .")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": ()}, r"steps=\(\): must be numbers from 2 on"),
        ({"steps": (1, 2)}, r"steps=\(1, 2\)"),
        ({"steps": (3, 2)}, "in rising order"),
        ({"classes": 7}, r"classes=7: must be from twice the longest of steps=\(2, 3, 4\)"),
        ({"classes": 41}, "to 40, for which there are names"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        ProsqaData(**settings)


def test_graphs_that_hardly_exist_are_an_error():
    with pytest.raises(DataError, match="hardly more than 0 different questions of level 8"):
        ProsqaData(steps=(8,)).task().questions("train")
