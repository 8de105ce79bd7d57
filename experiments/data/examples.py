"""Instruction data: examples of JSON lines, each a conversation whose answers alone count in the loss."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data.cache import digest
from experiments.data.corpus import CORPUS_FORMAT, Source, Text
from experiments.data.protocol import DataError
from experiments.data.sources import VALIDATION_SHARE, matching_files

ROLES = ("system", "user", "assistant")
COMPLETIONS = ("completion", "response", "answer")  # what the answer to a `prompt` may be called


class Example(NamedTuple):
    """A conversation, `{"role": ..., "content": ...}` each; those of one group go to one side of a split."""

    messages: list[dict[str, str]]
    group: str


def chat_files(pattern: str) -> Source:
    """JSON lines, one example each, in one of two forms.

    * `{"messages": [{"role": "system" | "user" | "assistant", "content": TEXT}, ...]}`, which ends with an answer;
    * `{"prompt": TEXT, "completion": TEXT}`, where the answer may also be called `response` or `answer`.

    An example may have a `group`, a text such as the passage that it is about; without it, its messages before the
    first answer are one. One group in ten, chosen by its hash, is for validation, and at least one. Empty lines and
    other fields are passed over.

    Args:
      pattern: a glob (`**` goes into folders), a folder (all files in it and below), or one file.

    Raises:
      DataError: no file matches. When the text is prepared: a line is no example; the message names file, line and
        what is missing. All lines are checked before anything is prepared.
    """
    paths = matching_files(pattern)
    if not paths:
        raise DataError(
            f"source='chat:{pattern}': no file matches; check the path, and put the pattern in quotes so "
            "that the shell does not expand it"
        )
    root = os.path.commonpath([path.parent for path in paths])
    names = {os.fsencode(path.relative_to(root)).decode("utf-8", "replace"): path for path in paths}
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in names.items()]
    return Source(
        name=f"chat:{pattern}",
        folder=re.sub(r"\W+", "-", f"chat-{os.path.basename(root)}").strip("-"),
        key=digest(CORPUS_FORMAT, "chat", os.path.abspath(root), stats),
        splits=("train", "validation"),
        texts=lambda split: example_texts(names, split),
    )


def example_texts(files: Mapping[str, Path], split: str) -> Iterator[Text]:
    """The examples of a split, the messages of each as JSON.

    Args:
      files: of JSON lines, by the name with which the names of their examples begin.
      split: `train` or `validation`.

    Raises:
      DataError: see `chat_files`.
    """
    groups = {_sha(example.group) for path in files.values() for _, example in read_examples(path)}
    held_out = set(sorted(groups)[: max(1, len(groups) // VALIDATION_SHARE)])
    for name, path in files.items():
        for number, example in read_examples(path):
            if (_sha(example.group) in held_out) == (split == "validation"):
                yield Text(f"{name}/{number:07d}", json.dumps(example.messages, ensure_ascii=False))


def read_examples(path: Path) -> Iterator[tuple[int, Example]]:
    """The examples of a file with the numbers of their lines, from 1.

    Raises:
      DataError: see `chat_files`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, _example(line)
                    except ValueError as error:
                        raise DataError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None


def _sha(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _example(line: bytes) -> Example:
    """An example; ValueError with the second half of a sentence that begins with its place."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error}); write one object per line") from None
    except RecursionError:
        raise ValueError("no JSON that can be read (nested too deeply); write one object per line") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} and no object; give it 'messages', or 'prompt' and 'completion'")
    messages = list(_turns(value["messages"]) if "messages" in value else _pair(value))
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise ValueError("no message has the role 'assistant', so there is no answer; add one")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message has the role {messages[-1]['role']!r}: its answer is missing; add it")
    if not any(message["role"] == "user" for message in messages[:first]):
        raise ValueError("no message of the role 'user' is before the first answer; add what it answers")
    return Example(messages, _text(value.get("group", json.dumps(messages[:first])), "group"))


def _turns(messages: Any) -> Iterator[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' holds no messages; give it a list of objects with 'role' and 'content'")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {place} is a {type(message).__name__} and no object with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES or (role == "system" and place):
            known = "must be system (the first message only), user or assistant"
            raise ValueError(f"message {place} has the role {role!r}: {known}")
        yield _message(role, message.get("content"), f"content of message {place} ({role})")


def _pair(value: dict[str, Any]) -> Iterable[dict[str, str]]:
    found = [name for name in COMPLETIONS if name in value]
    if "prompt" not in value or len(found) != 1:
        has = ", ".join(map(repr, value)) or "nothing"
        raise ValueError(
            f"it has {has}; give it 'messages', or 'prompt' and one of {', '.join(map(repr, COMPLETIONS))}"
        )
    return [_message("user", value["prompt"], "prompt"), _message("assistant", value[found[0]], found[0])]


def _message(role: str, content: Any, what: str) -> dict[str, str]:
    text = _text(content, what)
    if role != "system" and not text.strip():
        raise ValueError(f"{what} is empty; give it text, or remove the line")
    return {"role": role, "content": text}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {'missing' if value is None else f'a {type(value).__name__}'}; give it a text")
    if "\0" in value or value != value.encode("utf-8", "replace").decode("utf-8"):
        raise ValueError(f"{what} has a NUL or half of a surrogate pair, which no text has; remove it")
    return value
