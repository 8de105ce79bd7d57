"""Reading and writing turn by turn gives what one call over the whole text gives, and stops where it should."""

import jax
import numpy as np
import pytest
import tiny_run

from experiments.conversation import Reader, Spelling, Style
from experiments.data.tokenizers import ByteTokenizer
from fam_jax import generate

BYTES = ByteTokenizer()
memories = pytest.mark.parametrize(
    "memory", [tiny_run.FAM, pytest.param(None, marks=pytest.mark.slow)], ids=["fam", "full"]
)
CONTEXT = BYTES.encode("".join(chr(97 + i * i % 26) for i in range(45)))
QUESTIONS = [BYTES.encode(text) for text in ("what?", "x", "a longer question than the chunk")]
KEY = jax.random.key(3)


def reader(memory=tiny_run.FAM, **style):
    return Reader(*tiny_run.init(tiny_run.model_config(memory)), Style(**{"max_new_tokens": 6, "chunk": 16} | style))


def at_once(memory, ids, new=6, **options):
    """What follows one text; all are padded to the same length, for which one program is compiled."""
    model, variables = tiny_run.init(tiny_run.model_config(memory))
    prompt = np.pad(ids, (0, 128 - len(ids)))[None]
    return np.asarray(generate(model, variables, prompt, new, lengths=np.array([len(ids)]), **options).ids)[0]


@memories
def test_questions_after_a_context_are_answered_as_if_each_were_alone(memory):
    reading = reader(memory)
    state, count = reading.read([CONTEXT[:7], CONTEXT[7:]])
    assert count == 45
    for question in (*QUESTIONS, QUESTIONS[0]):
        answer = reading.answer([question], BYTES.decode, state)
        np.testing.assert_array_equal(answer.ids, at_once(memory, np.concatenate([CONTEXT, question])))
        assert answer.prompt_tokens == len(question)


@memories
def test_a_conversation_is_one_text(memory):
    reading = reader(memory)
    text, state = np.zeros(0, np.int32), None
    for question in QUESTIONS:
        answer = reading.answer([question], BYTES.decode, state)
        text, state = np.concatenate([text, question]), answer.state
        np.testing.assert_array_equal(answer.ids, at_once(memory, text))
        text = np.concatenate([text, answer.ids])


def test_sampling_and_penalties_are_those_of_generate():
    options = dict(temperature=2.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.4)
    answer = reader(max_new_tokens=12, **options).answer([CONTEXT], BYTES.decode, key=KEY)
    np.testing.assert_array_equal(answer.ids, at_once(tiny_run.FAM, CONTEXT, 12, key=KEY, **options))
    with pytest.raises(ValueError, match=r"needs key=jax\.random\.key"):
        reader(temperature=1.0).answer([CONTEXT], BYTES.decode)


def test_a_penalty_counts_all_turns_but_not_what_was_only_read():
    reading = reader(repetition_penalty=1.4)
    state, _ = reading.read([CONTEXT])
    first = reading.answer([QUESTIONS[0]], BYTES.decode, state)
    assert set(np.flatnonzero(first.seen)) == {*QUESTIONS[0], *first.ids}
    second = reading.answer([QUESTIONS[1]], BYTES.decode, first.state, seen=first.seen)
    assert set(np.flatnonzero(second.seen)) == {*QUESTIONS[0], *first.ids, *QUESTIONS[1], *second.ids}
    assert set(np.flatnonzero(first.seen)) == {*QUESTIONS[0], *first.ids}


@pytest.mark.parametrize("ends", [True, False])
def test_an_answer_ends_at_a_token_or_a_text(ends):
    """And the state has read no more than that."""
    free = reader().answer([CONTEXT], BYTES.decode)
    at = next(i for i in range(1, 6) if free.ids[i] not in free.ids[:i] and free.ids[i] < 128)
    style = {"ends": (int(free.ids[at]), 999)} if ends else {"stop": ("never", chr(free.ids[at]))}
    shown = []
    answer = reader(**style).answer([CONTEXT], BYTES.decode, show=shown.append)
    np.testing.assert_array_equal(answer.ids, free.ids[: at + 1])
    if not ends:
        assert answer.text == BYTES.decode(free.ids[: at + 1])[:-1]
    assert "".join(shown) == answer.text
    assert int(answer.state.blocks[0]) * 8 + int(answer.state.offset[0]) == 45 + at + 1


def spell(text, stop=(), decode=BYTES.decode, ids=None):
    """What is shown, what comes back, and how many tokens were taken."""
    shown = []
    spelling = Spelling(decode, stop, shown.append)
    ids = BYTES.encode(text) if ids is None else ids
    taken = next((n for n, token in enumerate(ids, 1) if spelling.add(int(token))), len(ids))
    text = spelling.close()
    assert "".join(shown) == text
    return shown, text, taken


def test_characters_are_shown_when_they_are_complete():
    shown, text, _ = spell("aö三😀b")
    assert (shown, text) == (["a", "ö", "三", "😀", "b"], "aö三😀b")
    assert spell("", ids=[97, 0xE4])[1] == "a\ufffd"  # it never becomes complete
    assert spell("", ids=[0xE4, 97, 98])[1] == BYTES.decode([0xE4, 97, 98])


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one\nQ: two", ("\nQ:",), "one"),
        ("one\nQ two", ("\nQ:",), "one\nQ two"),
        ("aaab", ("aab",), "a"),
        ("stop", ("stop",), ""),
        ("sto", ("stop",), "sto"),
        ("x. y!", ("!", ". "), "x"),
        ("ab三cd", ("三",), "ab"),
    ],
)
def test_texts_to_stop_at(text, stop, want):
    _, got, taken = spell(text, stop)
    assert got == want
    if got != text:
        assert BYTES.decode(BYTES.encode(text)[:taken]).endswith(stop)


def test_words_get_their_blanks():
    """Decoders that put blanks between tokens, and none before the first."""
    words = ["the", "pass", "key"]
    assert spell("", decode=lambda ids: " ".join(words[i] for i in ids), ids=[0, 1, 2])[0] == ["the", " pass", " key"]


def test_impossible_styles_are_one_clear_error():
    for style in ({"chunk": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"min_p": 2.0}, {"top_k": 1000}):
        with pytest.raises(ValueError, match=next(iter(style))):
            reader(**style)
    for pieces in ([], [np.zeros(0, np.int32)]):
        with pytest.raises(ValueError, match="no token"):
            reader().read(pieces)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        reader(repetition_penalty=1.1).answer([np.array([300])], BYTES.decode)
