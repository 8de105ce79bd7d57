"""How turns become text: as they are, or by the chat template that came with a checkpoint's tokenizer.

Templates are Jinja, as Hugging Face writes them into `tokenizer_config.json`; they are run in a sandbox, since they are
programs that come with the files of strangers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from experiments.data import DataError
from experiments.files import as_os_errors


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """What the `tokenizer_config.json` beside a `tokenizer.json` says.

    Attributes:
        path: The file, for messages.
        ends: Ids that end an answer: `eos_token`, and the tokenizer's separator.
        bos: Id that begins a text; None for none, as without `add_bos_token`.
        template: `chat_template`, or the content of `chat_template.jinja`; None if there is none.
        tokens: Texts of special tokens by their names, such as `bos_token`, which templates use.
    """

    path: Path
    ends: tuple[int, ...]
    bos: int | None = None
    template: str | None = None
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)


def read_settings(tokenizer: Any, folder: Path) -> TokenizerSettings:
    """The settings of a tokenizer.

    Args:
        tokenizer: Any; those of tasks have no such settings.
        folder: Where its file is.

    Raises:
        DataError: `tokenizer_config.json` is there and is not what its name says.
    """
    path = folder / "tokenizer_config.json"
    separator = getattr(tokenizer, "separator", None)
    ends = () if separator is None else (int(separator),)
    with as_os_errors(path):
        if not hasattr(tokenizer, "token_id") or not path.exists():
            return TokenizerSettings(path, ends)
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        tokens = {name: _token(value) for name, value in content.items() if name.endswith("_token")}
        beside = path.with_name("chat_template.jinja")  # where newer versions of Hugging Face's library put it
        with as_os_errors(path):
            given = beside.read_text(encoding="utf-8") if beside.exists() else content.get("chat_template")
        # Templates write special tokens as text, which only a tokenizer.json makes tokens again.
        template = _template(given) if hasattr(tokenizer, "encode_literally") else None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not the settings of a tokenizer ({error}); copy the file again") from None
    known = {name: token for name, token in tokens.items() if token is not None}
    ids = {name: tokenizer.token_id(token) for name, token in known.items()}
    eos = ids.get("eos_token")
    return TokenizerSettings(
        path,
        ends if eos is None or eos in ends else (*ends, eos),
        ids.get("bos_token") if content.get("add_bos_token") is True else None,
        template,
        known,
    )


def _token(value: Any) -> str | None:
    """The text of a special token, which is given as it is or in an object; None if it is a flag or null."""
    text = value["content"] if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template(value: Any) -> str | None:
    """The chat template: the only one, or that of the name "default"."""
    if isinstance(value, list):
        named = {one["name"]: one["template"] for one in value}
        if "default" not in named:
            raise ValueError(f"chat_template has {', '.join(named) or 'nothing'} and no 'default'")
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"chat_template is a {type(value).__name__} and no text")
    return value


class Turns(Protocol):
    """How a conversation becomes text. The text of a document goes between `head` and the first turn."""

    def head(self) -> str:
        """What is before a document."""
        ...

    def first(self, question: str, document: bool) -> str:
        """What the model reads of the first question, after a document or without one."""
        ...

    def later(self, question: str, ended: str) -> str:
        """What it reads of a question after an answer that a certain token has ended, whose text is `ended`."""
        ...


class Plain:
    """Documents and turns are one text, with nothing around them."""

    def head(self) -> str:
        return ""

    def first(self, question: str, document: bool) -> str:
        return question

    def later(self, question: str, ended: str) -> str:
        return "\n" + question


class Chat:
    """Turns in the words of a chat template; a document is the beginning of the first message."""

    def __init__(self, settings: TokenizerSettings, system: str | None = None, now: datetime | None = None):
        """Compiles the template.

        Args:
            settings: Of the tokenizer.
            system: Message that goes before all others.
            now: What templates that write a date are told. None: the time at which they ask.

        Raises:
            DataError: There is no template, it is wrong, or jinja2 is not installed.
        """
        if settings.template is None:
            raise DataError(
                f"--chat needs a tokenizer.json, and a chat_template in {settings.path}, and there is none; leave "
                "--chat out, or copy the files from the model's source"
            )
        try:
            import jinja2
            import jinja2.sandbox
        except ImportError as error:
            raise DataError("chat templates need the package 'jinja2': pip install -e \".[chat]\"") from error
        self._settings, self._system, self._error = settings, system, jinja2.TemplateError
        # These settings, and the functions below, are what Hugging Face gives to templates.
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.filters["tojson"] = _tojson
        sandbox.globals["raise_exception"] = self._refuse
        sandbox.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
        try:
            self._template = sandbox.from_string(settings.template)
        except jinja2.TemplateError as error:
            raise DataError(f"{settings.path}: chat_template is no Jinja template ({error}); copy it again") from None
        self._mark = f"text-{secrets.token_hex(16)}"  # stands for what the template is not to see

    def head(self) -> str:
        return self._split([self._user(self._mark)])[0]

    def first(self, question: str, document: bool) -> str:
        if not document:
            return self._render([*self._begin(), self._user(question)])
        return self._split([self._user(f"{self._mark}\n\n{question}")])[1]

    def later(self, question: str, ended: str) -> str:
        # What follows an answer does not depend on what was before it, which need not be kept.
        turns = [self._user("..."), {"role": "assistant", "content": self._mark}, self._user(question)]
        rest = self._split(turns)[1]
        bare = rest.lstrip()
        return bare.removeprefix(ended) if ended and bare.startswith(ended) else rest

    @functools.cached_property
    def asks(self) -> str:
        """What the template writes to ask for an answer."""
        question = [self._user(self._mark)]
        asked, said = self._render(question), self._render(question, ask=False)
        return asked.removeprefix(said) if asked.startswith(said) else ""

    def around_answers(self, messages: list[dict[str, str]]) -> list[str]:
        """What the template writes before the first answer of a conversation, between answers, and after the last.

        Args:
            messages: Each with `role` and `content`; those of the role "assistant" are the answers.

        Returns:
            One text more than there are answers.

        Raises:
            DataError: The template does not take these messages, or does not write each answer once.
        """
        answers = sum(message["role"] == "assistant" for message in messages)
        marked = [m if m["role"] != "assistant" else {**m, "content": self._mark} for m in messages]
        parts = self._render(marked, ask=False).split(self._mark)
        if len(parts) != answers + 1:
            raise DataError(
                f"{self._settings.path}: chat_template writes {len(parts) - 1} answers of a conversation that has "
                f"{answers}; leave out such conversations, or the chat_template"
            )
        return parts

    def _begin(self) -> list[dict[str, str]]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    @staticmethod
    def _user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def _split(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """What is before the mark and after it."""
        parts = self._render([*self._begin(), *messages]).split(self._mark)
        if len(parts) != 2:
            raise DataError(
                f"{self._settings.path}: chat_template writes a message {len(parts) - 1} times, so that it cannot be "
                "read in parts; ask with --prompt and without --context-file"
            )
        return parts[0], parts[1]

    def _render(self, messages: list[dict[str, str]], ask: bool = True) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=ask, **self._settings.tokens)
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{self._settings.path}: chat_template does not take these messages ({roles}): {error}"
            ) from None

    def _refuse(self, message: str) -> None:
        raise self._error(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as it is; Jinja's own filter replaces characters that HTML gives a meaning."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
