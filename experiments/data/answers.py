"""Examples as tokens with weights: 1 for answers and what ends them, 0 for what they answer."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.data.cache import digest
from experiments.data.tokenizers import Literal, Tokenizer, encode_after
from experiments.data.tokens import Encoded, Encoder

if TYPE_CHECKING:
    from experiments.chat import Chat

FORMAT = 1  # of the tokens and weights made of an example
NOW = datetime(2024, 7, 26)  # for templates that write a date: the same text on every day


def example_encoder(tokenizer: Tokenizer, folder: Path) -> Encoder:
    """The encoder that belongs to a tokenizer: with the chat template of the `tokenizer_config.json` in its folder, if
    there is one.

    Raises:
      DataError: the template cannot be used.
    """
    from experiments.chat import Chat, read_settings  # which imports this package

    settings = read_settings(tokenizer, folder)
    if settings.template is None:
        return PlainEncoder(tokenizer)
    return ChatEncoder(tokenizer, Chat(settings, now=NOW), digest(FORMAT, settings.template, settings.tokens))


class _Pieces:
    """An example as it grows. Every piece is encoded by itself, but as what follows the text before it."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._word = ""

    def text(self, tokenizer: Tokenizer | Literal, text: str, counts: bool) -> None:
        self.ids(encode_after(tokenizer, self._word, text), counts)
        before = (self._word + text).rstrip()
        self._word = (self._word + text)[max(before.rfind(" "), before.rfind("\n")) + 1 :]

    def ids(self, ids: np.ndarray | list[int], counts: bool) -> None:
        if len(ids):
            self._ids.append(np.asarray(ids, np.int32))
            self._counts.append(np.full(len(ids), counts))

    def end(self, separator: int | None, counts: bool) -> None:
        """Adds the separator, unless it is the last token already."""
        if separator is not None and (not self._ids or self._ids[-1][-1] != separator):
            self.ids([separator], counts)

    def joined(self) -> Encoded:
        return Encoded(np.concatenate(self._ids), np.concatenate(self._counts))


class PlainEncoder:
    """Messages one after another, each on a line of its own; the separator ends an answer, or else a line break does.

    A conversation goes on after the separator, as `experiments.generate` does it. Nothing that a message spells
    becomes a special token.
    """

    hash = digest(FORMAT, "plain")

    def __init__(self, tokenizer: Tokenizer):
        self._literal, self._separator = Literal(tokenizer), tokenizer.separator

    def encode(self, text: str) -> Encoded:
        """Tokens and weights of an example, the JSON of its messages."""
        pieces, ended = _Pieces(), False
        for message in json.loads(text):
            answer = message["role"] == "assistant"
            pieces.text(self._literal, "\n" * ended + message["content"], answer)
            ended = answer and self._separator is not None
            if ended:
                pieces.end(self._separator, counts=True)
            else:
                pieces.text(self._literal, "\n", answer)
        return pieces.joined()


class ChatEncoder:
    """Messages in the words of a chat template, and the separator after the last, if that does not end with it.

    What the template writes after an answer counts up to its first token that is no blank: that ends the answer. What
    it writes before an answer, but not when it asks for one, such as empty thoughts, counts too. Nothing that an answer
    spells becomes a special token; questions are encoded with the template around them, as `experiments.generate` does.
    """

    def __init__(self, tokenizer: Tokenizer, chat: Chat, hash: str):
        self._tokenizer, self._literal, self._chat, self.hash = tokenizer, Literal(tokenizer), chat, hash

    def encode(self, text: str) -> Encoded:
        """Tokens and weights of an example, the JSON of its messages.

        Raises:
          DataError: the template does not take these messages.
        """
        messages = json.loads(text)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        first, *others = self._chat.around_answers(messages)
        pieces, ended = _Pieces(), False
        self._ask(pieces, first)
        for number, (answer, after) in enumerate(zip(answers, others, strict=True), 1):
            pieces.text(self._literal, answer, True)
            ending, rest = self._ending(after)
            pieces.text(self._tokenizer, ending, True)
            ended = bool(ending)
            if number < len(answers):
                self._ask(pieces, rest)
            else:
                pieces.text(self._tokenizer, rest, False)
        pieces.end(self._tokenizer.separator, counts=not ended)
        return pieces.joined()

    def _ask(self, pieces: _Pieces, text: str) -> None:
        """Adds what is before an answer."""
        asks = self._chat.asks
        end = text.rindex(asks) + len(asks) if asks and asks in text else len(text)
        pieces.text(self._tokenizer, text[:end], False)
        pieces.text(self._tokenizer, text[end:], True)

    def _ending(self, text: str) -> tuple[str, str]:
        """What ends an answer, and the rest of the text after it."""
        ids = self._tokenizer.encode(text)
        for count in range(1, len(ids) + 1):
            token = self._tokenizer.decode(ids[:count]).strip()
            if token and text.lstrip().startswith(token):
                end = text.index(token) + len(token)
                return text[:end], text[end:]
        return "", text
