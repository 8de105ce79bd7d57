"""Arithmetic expressions against an evaluator of their own, and the batches of finite sets of questions."""

import ast
import itertools
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from experiments.data import Batches, DataError
from experiments.data import questions as questions_module
from experiments.data.arithmetic import LARGEST, MODULUS, Arithmetic, ArithmeticData
from experiments.data.questions import BLANK, QuestionBatches, split_of

READINGS = ("integers", "modular")
SMALL = {"samples": 150, "test_samples": 40, "batch_size": 8}


def texts(operands=(2, 4, 6), split="train", **settings):
    """Expressions and their lines, each a list of tokens without the signs of equality."""
    task = ArithmeticData(**{**SMALL, "operands": operands, **settings}).task()
    rows = task.questions(split)
    found = []
    for ids, end in zip(rows.ids, rows.ends, strict=True):
        text = task.tokenizer.decode(ids[:end])
        assert text.endswith(" <eos>")
        found.append([line.split() for line in text.removesuffix(" <eos>").split(" = ")])
    return found


def values(line, reading):
    """The value of a line, by Python's own precedence, and those of all of its operations."""
    met = []

    def visit(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        a, b = visit(node.left), visit(node.right)
        assert not (isinstance(node.op, ast.Div) and b == 0)
        # The inverse of a residue is by Fermat's little theorem.
        ratio = a * b ** (MODULUS - 2) if reading == "modular" else b and a / b
        value = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b, ast.Div: ratio}[type(node.op)]
        met.append(value % MODULUS if reading == "modular" else value)
        return met[-1]

    return [visit(ast.parse(" ".join(line), mode="eval").body), *met]


@pytest.mark.parametrize("reading", READINGS)
def test_every_line_has_the_value_of_the_first(reading):
    for lines in texts(reading=reading):
        last = Fraction(lines[-1][0])
        assert len(lines[-1]) == 1
        assert {values(line, reading)[0] for line in lines} == {last}


def reductions(line, reading):
    """All lines that one operation between neighbouring numbers, with its brackets if it has some, leads to."""
    for start in range(len(line) - 2):
        piece = line[start : start + 3]
        if piece[0].isdigit() and piece[1] in "+-*/" and piece[2].isdigit() and piece[1:] != ["/", "0"]:
            value = str(values(piece, reading)[0])
            around = line[start - 1 : start] + line[start + 3 : start + 4]
            if around == ["(", ")"]:
                yield [*line[: start - 1], value, *line[start + 4 :]]
            else:
                yield [*line[:start], value, *line[start + 3 :]]


@pytest.mark.parametrize("reading", READINGS)
def test_each_step_is_one_operation(reading):
    for lines in texts(reading=reading):
        for line, following in itertools.pairwise(lines):
            assert following in list(reductions(line, reading)), (line, following)


@pytest.mark.parametrize("reading", READINGS)
def test_lines_have_one_number_less_each(reading):
    for operands in (2, 5):
        for lines in texts((operands,), reading=reading):
            assert [sum(token.isdigit() for token in line) for line in lines] == list(range(operands, 0, -1))


def test_integers_stay_in_range_in_every_order_of_evaluation():
    """The operations that Python's precedence finds in a line are all those that any order can do."""
    for lines in texts():
        for line in lines:
            for value in values(line, "integers"):
                assert value.denominator == 1
                assert 0 <= value <= LARGEST
        for a, op, b in zip(lines[0], lines[0][1:], lines[0][2:], strict=False):
            assert not (op in "*/" and b == "1")
            assert not (op == "*" and a == "1")


def test_residues_are_below_the_modulus():
    for lines in texts(reading="modular"):
        assert all(int(token) < MODULUS for line in lines for token in line if token.isdigit())


def without(line, opening):
    """A line without the brackets of which one opens at a place."""
    depth = 0
    for place in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return line[:opening] + line[opening + 1 : place] + line[place + 1 :]
    raise AssertionError(line)


def test_no_brackets_of_integers_are_too_many():
    count = 0
    for lines in texts():
        for line in lines:
            for place in (i for i, token in enumerate(line) if token == "("):
                assert ast.dump(ast.parse(" ".join(without(line, place)))) != ast.dump(ast.parse(" ".join(line)))
                count += 1
    assert count > 100


@pytest.mark.parametrize(
    ("line", "sign", "integers", "modular"),
    [
        ("x", "+", False, False),
        ("( x )", "*", False, False),
        ("x + 2", "-", False, False),
        ("x * 2", "+", True, True),
        ("x / 2", "-", True, True),
        ("x / 2", "/", False, False),
        ("2 + x", "*", False, False),
        ("2 - x", "/", False, False),
        ("2 + x", "-", True, False),
        ("2 - x", "+", True, True),
        ("2 * x", "/", True, False),
        ("2 / x", "*", True, True),
        ("2 * x", "+", True, True),
        ("2 - x * 3", "+", True, True),
        ("2 + x * 3", "/", False, False),
    ],
)
def test_brackets_stand_where_precedence_demands_them(line, sign, integers, modular):
    before, after = line.split("x")
    around = [(before.split() or [None])[-1], sign, (after.split() or [None])[0]]
    for reading, needed in (("integers", integers), ("modular", modular)):
        task = Arithmetic(ArithmeticData(reading=reading))
        ids = (np.array([task.tokenizer.ids.get(token, BLANK)]) for token in around)
        assert task._need_brackets(*ids).tolist() == [needed], reading


def test_operators_are_equally_likely():
    counts = Counter(token for lines in texts((6,), reading="modular", samples=2000) for token in lines[0])
    shares = np.array([counts[op] for op in "+-*/"]) / 10_000
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    integers = Counter(token for lines in texts((6,), samples=2000) for token in lines[0])
    assert min(integers[op] for op in "+-*/") > 1000


@pytest.mark.parametrize("reading", READINGS)
def test_questions_are_different_and_in_one_split(reading):
    """Whatever the seeds."""
    sets = {}
    for split in ("train", "test"):
        for seed in (0, 1):
            lines = [" ".join(each[0]) for each in texts(split=split, seed=seed, reading=reading)]
            assert len(set(lines)) == len(lines) == 3 * SMALL["samples" if split == "train" else "test_samples"]
            sets[split, seed] = lines
    assert sets["test", 0] == sets["test", 1]
    assert sets["train", 0] != sets["train", 1]
    assert not (set(sets["train", 0]) | set(sets["train", 1])) & set(sets["test", 0])


def test_the_hash_decides_the_split():
    """A change of the hash would move questions that models were trained on into the test."""
    task = ArithmeticData(**SMALL).task()
    for split in ("train", "test"):
        rows = task.questions(split)
        assert {split_of(ids[:n].astype("<i2").tobytes()) for ids, n in zip(rows.ids, rows.prompt, strict=True)} == {
            split
        }
    expressions = [f"{n} + {n} =" for n in range(60)]
    hashed = [split_of(task.tokenizer.encode(text).astype("<i2").tobytes()) for text in expressions]
    assert [n for n, split in enumerate(hashed) if split == "test"] == [7, 8, 13, 15, 29, 34]


def test_a_larger_set_begins_with_the_smaller():
    assert texts((4,), samples=30) == texts((4,), samples=150)[:30]


def test_rows():
    config = ArithmeticData(**SMALL, operands=(3, 6))
    task = config.task()
    rows = task.questions("train")
    batch = rows.batch()
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "tokens": ("int32", (300, config.length)),
        "targets": ("int32", (300, config.length)),
        "weights": ("float32", (300, config.length)),
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    equals, end = task.tokenizer.ids["="], task.tokenizer.separator
    for tokens, targets, weights, prompt in zip(*batch.values(), rows.prompt, strict=True):
        first = tokens.tolist().index(equals)
        assert first == prompt - 1
        last = targets.tolist().index(end)
        assert weights.tolist() == [float(first <= place <= last) for place in range(config.length)]
        assert (targets[last:] == end).all()
    assert (rows.level == np.repeat([3, 6], 150)).all()


def test_the_longest_sample_fills_a_row():
    task = ArithmeticData(**SMALL).task()
    lines = ["9 - ( 9 - ( 9 - ( 9 - ( 9 - 9 ) ) ) )", "9 - ( 9 - ( 9 - ( 9 - 0 ) ) )", "9 - ( 9 - ( 9 - 9 ) )"]
    lines += ["9 - ( 9 - 0 )", "9 - 9", "0"]
    assert len(task.tokenizer.encode(" = ".join(lines) + " <eos>")) == task.config.length + 1
    assert max(task.questions("train").ends) <= task.config.length + 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7 <eos>", 7),
        ("7 <eos>", 7),
        ("( ( + = 12 <eos>", 12),
        ("3 + 4 = 7", None),
        ("3 + 4 <eos>", None),
        ("= <eos>", None),
        ("<eos>", None),
        ("", None),
        ("3 + 4 = + <eos>", None),
        ("3 + 4 = 7 7 <eos>", None),
    ],
)
def test_the_answer_of_a_text(text, answer):
    task = ArithmeticData().task()
    assert task.answer(task.tokenizer.encode(text)) == answer


def test_answers_are_the_last_numbers():
    task = ArithmeticData(**SMALL).task()
    rows = task.questions("test")
    for ids, prompt, end in zip(rows.ids, rows.prompt, rows.ends, strict=True):
        assert task.answer(ids[prompt:end]) == int(task.tokenizer.decode(ids[:end]).split()[-2])


def test_tokenizer():
    tokenizer = ArithmeticData().task().tokenizer
    assert tokenizer.decode(tokenizer.encode("(3+14)*5=<eos>")) == "( 3 + 14 ) * 5 = <eos>"
    assert tokenizer.encode("0 200").tolist() == [0, 200]
    assert ArithmeticData(reading="modular").vocab_size == 11 + 7 + 1
    with pytest.raises(DataError, match=r"arithmetic task has no '201', 'x'; it knows 0 \.\.\. <eos>, 209 words"):
        tokenizer.encode("201 * x")
    with pytest.raises(ValueError, match="token id 209 is outside"):
        tokenizer.decode([209])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operands": ()}, r"operands=\(\): must be numbers from 2 on"),
        ({"operands": (1, 4)}, r"operands=\(1, 4\)"),
        ({"operands": (4, 4)}, "in rising order"),
        ({"reading": "reals"}, "reading='reals': must be integers or modular"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"test_samples": 0}, "test_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticData(**settings)


def test_more_questions_than_there_are_is_an_error():
    with pytest.raises(DataError, match=r"samples=50000: .* hardly more than 4.. different questions of level 2"):
        ArithmeticData(operands=(2,), reading="modular").task().questions("train")


def test_a_search_that_finds_nothing_ends(monkeypatch):
    task = Arithmetic(ArithmeticData(**SMALL))
    none = task.draw(3, 0, 0)[:0]
    monkeypatch.setattr(task, "draw", lambda *_: none)
    with pytest.raises(DataError, match="hardly more than 0"):
        questions_module._collect(task, 3, 0, "train", 5)


def batches(split="train", **settings):
    return QuestionBatches(ArithmeticData(**{**SMALL, "operands": (3,), **settings}), split)


def rows_of(batch):
    return [row.tobytes() for row in batch["tokens"]]


def test_every_question_once_per_epoch_in_another_order():
    """150 questions and batches of 8: epochs end within batches."""
    data = batches()
    assert isinstance(data, Batches)
    assert iter(data) is data
    drawn = [row for _ in range(75) for row in rows_of(next(data))]
    epochs = [drawn[i : i + 150] for i in range(0, 600, 150)]
    assert len(set(map(tuple, epochs))) == 4
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert len(set(epochs[0])) == 150


def test_a_batch_may_be_larger_than_the_set():
    drawn = rows_of(next(batches(samples=5, batch_size=12)))
    assert len(set(drawn[:5])) == len(set(drawn[5:10])) == 5


def test_test_rows_come_in_a_fixed_order_level_by_level_in_turn():
    one, two = (batches(split, seed=seed, operands=(2, 5)) for split, seed in (("test", 0), ("validation", 7)))
    seen = []
    for _ in range(12):
        first, second = next(one), next(two)
        np.testing.assert_array_equal(first["tokens"], second["tokens"])
        assert [weights.sum() > 2 for weights in first["weights"]] == [False, True] * 4
        seen += rows_of(first)
    assert seen[80:] == seen[:16]  # 80 questions are 10 batches
    assert len(set(seen)) == 80


def test_same_settings_same_batches_and_another_seed_others():
    one, two, other = (next(batches(seed=seed))["tokens"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


@pytest.mark.parametrize("split", ["train", "test"])
def test_resumes_exactly_after_every_step(split):
    data = batches(split)
    states, drawn = [data.get_state()], []
    for _ in range(40):
        drawn.append(next(data))
        states.append(data.get_state())
    for step in (0, 1, 17, 18, 19, 39):
        again = batches(split)
        again.set_state(json.loads(json.dumps(states[step])))
        assert again.get_state() == states[step]
        for batch in drawn[step : step + 3]:
            for key, value in next(again).items():
                np.testing.assert_array_equal(value, batch[key], key)
    data.set_state(states[0])
    np.testing.assert_array_equal(next(data)["tokens"], drawn[0]["tokens"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed=0, not 7"),
        ({"batch_size": 9}, "batch_size=8, not 9"),
        ({"operands": (3, 4)}, r"operands=\[3\], not \[3, 4\]"),
        ({"reading": "modular"}, "reading='integers', not 'modular'"),
        ({"samples": 149}, "samples=150, not 149"),
    ],
)
def test_a_position_of_other_settings_is_refused(change, named):
    with pytest.raises(DataError, match=f"this position belongs to questions with {named}; use the same"):
        batches(**change).set_state(batches().get_state())


def test_a_position_of_another_split_or_other_questions_is_refused():
    state = batches().get_state()
    with pytest.raises(DataError, match="train=True, not False"):
        batches("test").set_state(state)
    state["data"]["content"] = "0"
    with pytest.raises(DataError, match="content='0'"):
        batches().set_state(state)


def test_what_is_no_position_is_refused():
    data = batches()
    for state in (None, {}, {"step": 3}, {"data": 3}):
        with pytest.raises(DataError, match="no position in questions"):
            data.set_state(state)
    for step in (-1, "three", None):
        with pytest.raises(DataError, match="damaged"):
            data.set_state({**data.get_state(), "step": step})
    with pytest.raises(ValueError, match="split='dev': a task of questions has train and test"):
        batches("dev")
