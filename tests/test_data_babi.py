"""Questions in book text, read back line by line and answered by a reader of its own."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from data_helpers import small_books

from experiments.data import DataError, documents
from experiments.data.babi import BabiData
from experiments.data.levels import LevelBatches
from experiments.data.stories import FACTS, PEOPLE, PLACES, THINGS, longest_sentences, story

MOVE = re.compile(r"(\w+) (?:moved|went|travelled|journeyed) to the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:took|got|grabbed) the (\w+)\.")
DROP = re.compile(r"(\w+) (?:dropped|discarded|left) the (\w+)\.")
GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
RELATION = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)\.")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return small_books(tmp_path_factory.mktemp("babi"))


def answer(facts, question):
    """Follows the facts; checks that nothing impossible is told."""
    at, has, trail, gifts, relations = {}, {}, {}, [], []
    for fact in facts:
        if found := MOVE.fullmatch(fact):
            person, place = found.groups()
            assert at.get(person) != place
            at[person] = place
            for thing in (thing for thing, holder in has.items() if holder == person):
                trail[thing].append(place)
        elif found := TAKE.fullmatch(fact):
            person, thing = found.groups()
            assert thing not in has
            assert trail.setdefault(thing, [at[person]])[-1] == at[person]
            has[thing] = person
        elif found := DROP.fullmatch(fact):
            person, thing = found.groups()
            assert has.pop(thing) == person
        elif found := GIVE.fullmatch(fact):
            giver, thing, person = found.groups()
            assert has[thing] == giver != person
            assert at[giver] == at[person]
            has[thing] = person
            gifts.insert(0, found.groups())
        else:
            relations.append(RELATION.fullmatch(fact).groups())
    forms = {
        r"Where is (\w+)\?": lambda person: at[person],
        r"Where is the (\w+)\?": lambda thing: trail[thing][-1],
        r"Where was the (\w+) before the (\w+)\?": lambda thing, place: before(trail[thing], place),
        r"What is (\w+) of the (\w+)\?": lambda way, place: only(a for a, w, b in relations if (w, b) == (way, place)),
        r"What is the (\w+) (\w+) of\?": lambda place, way: only(b for a, w, b in relations if (a, w) == (place, way)),
        r"What did (\w+) give to (\w+)\?": lambda a, b: next(t for g, t, p in gifts if (g, p) == (a, b)),
        r"Who gave the (\w+) to (\w+)\?": lambda a, b: next(g for g, t, p in gifts if (t, p) == (a, b)),
        r"Who did (\w+) give the (\w+) to\?": lambda a, b: next(p for g, t, p in gifts if (g, t) == (a, b)),
        r"Who gave the (\w+)\?": lambda a: next(g for g, t, p in gifts if t == a),
        r"Who received the (\w+)\?": lambda a: next(p for g, t, p in gifts if t == a),
    }
    (found,) = [(solve, m.groups()) for form, solve in forms.items() if (m := re.fullmatch(form, question))]
    return found[0](*found[1])


def before(places, place):
    assert places.count(place) == 1
    return places[places.index(place) - 1]


def only(found):
    (one,) = found
    return one


@pytest.mark.parametrize("kind", FACTS)
def test_answers_follow_from_the_facts(kind):
    rng = np.random.default_rng(0)
    stories = [story(kind, rng) for _ in range(400)]
    counts = [len(one.facts) for one in stories]
    low, high = FACTS[kind]
    assert min(counts) >= low
    assert max(counts) == high
    longest = [max(len(part) for part in parts) for parts in longest_sentences_of(stories)]
    assert all(have <= len(most) for have, most in zip(longest, longest_sentences(kind), strict=True))
    for one in stories:
        assert answer(one.facts, one.question) == one.answer
    # Whatever is asked for, all of it is an answer about equally often.
    words, counts = np.unique([one.answer for one in stories if one.answer in PLACES], return_counts=True)
    if kind < 5:
        assert set(words) == set(PLACES)
        assert (counts > 30).all()
    else:
        assert {one.answer for one in stories} == {*PEOPLE, *THINGS}


def longest_sentences_of(stories):
    facts = [fact for one in stories for fact in one.facts]
    return facts, [one.question for one in stories], [one.answer for one in stories]


def test_relations_that_are_turned_round_would_be_wrong():
    """Both facts tell of one direction only; of each question just one place is right."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        one = story(4, rng)
        facts = [RELATION.fullmatch(fact).groups() for fact in one.facts]
        opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
        all_facts = facts + [(b, opposite[way], a) for a, way, b in facts]
        assert len({(way, b) for _, way, b in all_facts}) == len({(a, way) for a, way, _ in all_facts}) == 4


def rows_of(config, level, rows=20, split="train"):
    """Of each row the text up to the end of the answer, and the answer."""
    task = config.task(split)
    batch = task.sample(np.random.default_rng(0), rows, level)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
        asked = np.flatnonzero(weights)
        assert asked.tolist() == list(range(len(weights) - len(asked), len(weights)))
        yield task.tokenizer.decode([*tokens, targets[-1]]), task.tokenizer.decode(targets[asked])


@pytest.mark.parametrize("questions", [(1,), (4, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_facts_stand_in_order_between_the_lines_of_the_text(books, questions, split):
    config = BabiData(**books, blocks=(14,), questions=questions)
    whole = ["".join(map(chr, one.tokens)) for one in documents(config.text, split)]
    around = "".join(whole + whole)  # after the last book comes the first
    for text, answered in rows_of(config, 20, split=split):
        assert len(text) == 20 * 64 + 1
        *lines, last = text.split("\n")
        assert answered == " " + answer([line for line in lines if is_fact(line)], last[: -len(answered)])
        assert last.endswith(answered)
        rest = "\n".join(line for line in lines if not is_fact(line))
        assert re.match(r"\d+ lines before", rest)  # the beginning of a line
        assert rest in around


def is_fact(line):
    return any(form.fullmatch(line) for form in (MOVE, TAKE, DROP, GIVE, RELATION))


def test_facts_stand_anywhere(books):
    config = BabiData(**books, blocks=(20,), questions=(4,))
    places = []
    for text, _ in rows_of(config, 20, rows=200):
        places += [found.start() for found in RELATION.finditer(text)]
    counts = np.histogram(places, 4, (0, 20 * 64))[0]
    assert (counts > 60).all()


def test_the_shortest_length_holds_every_story(books):
    for kind in FACTS:
        config = BabiData(**books, blocks=(30,), questions=(kind,))
        config.task().sample(np.random.default_rng(0), 60, config.shortest)
        with pytest.raises(ValueError, match=rf"blocks=\(1,\): must be at least {config.shortest} with block_size=64"):
            config.check_levels([1])
    with pytest.raises(ValueError, match="blocks=5: must be at least 6"):
        BabiData(**books).task().sample(np.random.default_rng(0), 50, 5)


def test_kinds_are_measured_one_by_one(books):
    config = BabiData(**books, questions=(1, 4))
    parts = config.parts()
    assert list(parts) == [", question 1", ", question 4"]
    assert [part.questions for part in parts.values()] == [(1,), (4,)]


def test_a_position_belongs_to_the_text_and_not_to_its_place(books, tmp_path):
    config = BabiData(**books, batch_size=2)
    state = json.loads(json.dumps(LevelBatches(config).get_state()))
    LevelBatches(dataclasses.replace(config, data_dir=str(tmp_path / "elsewhere"))).set_state(state)
    folder = Path(books["source"].removeprefix("text:"))
    (tmp_path / "books").mkdir()
    for number in range(3, 20):
        (tmp_path / "books" / f"{number}.txt").write_text((folder / f"{number}.txt").read_text() + "more\n")
    other = dataclasses.replace(config, source=f"text:{tmp_path}/books", data_dir=str(tmp_path / "other"))
    state["config"]["source"] = other.source
    with pytest.raises(DataError, match="belongs to bAbI-like data with content="):
        LevelBatches(other).set_state(state)


def test_a_text_of_one_line_is_refused(tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(20):
        (tmp_path / "books" / f"{number}.txt").write_text(f"one line {number}")
    config = BabiData(source=f"text:{tmp_path}/books", data_dir=str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"the document '.*' has one line only; facts need more"):
        config.task().sample(np.random.default_rng(0), 2, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": ()}, r"questions=\(\): must be kinds from 1 to 5 in rising order"),
        ({"questions": (6,)}, r"questions=\(6,\)"),
        ({"questions": (2, 1)}, r"questions=\(2, 1\)"),
        ({"source": "instructions"}, "source='instructions': must be whole texts"),
        ({"source": "nothing"}, "source='nothing': must be python-source, shakespeare"),
        ({"tokenizer": ""}, "tokenizer='': must be bytes"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        BabiData(**settings)
