"""Our models in the lm-evaluation-harness: `HarnessModel` answers its three kinds of requests.

Importing this needs the extra `lm-eval`; `experiments.harness`, the command, imports it only when it runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from experiments.data.tokenizers import Tokenizer
from experiments.scoring import Reader
from fam_jax import Decoder
from fam_jax.call import check_ids

MAX_GEN_TOKS = 256  # the harness's default
# What the harness calls the length of an answer, in its order of precedence.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """A decoder and its tokenizer, as the harness wants a model.

    Texts are read whole: in a stream of constant size with a block memory, into a cache as long as the text with full
    attention, unless that is given a `max_length`. Empty contexts and whole texts begin with the tokenizer's separator,
    which ends a text in training; in stream mode, where documents start with an empty state, no model has read it.

    Greedy answers and likelihoods do not depend on which requests are read together; sampled answers do.
    """

    def __init__(
        self,
        model: Decoder,
        variables: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        chunk: int = 512,
        max_length: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        """Wraps a model.

        Args:
            model: The decoder.
            variables: Its parameters.
            tokenizer: That of its training.
            batch_size: Texts side by side.
            chunk: Most tokens of a text at once; rounded up to whole blocks.
            max_length: Full attention only: tokens that the model may see at once. Contexts lose what is too much on
                the left, and a whole text is scored in windows that do not overlap, as the harness does it. None: all.
            seed: Of sampled answers.
            progress: Show progress bars.

        Raises:
            ValueError: A size is impossible.
        """
        super().__init__()
        if max_length is not None and (model.config.memory is not None or max_length < 1):
            allowed = "it must be at least 1" if model.config.memory is None else "a block memory reads texts whole"
            raise ValueError(f"max_length={max_length} is not allowed: {allowed}; leave it out, or give another")
        self._reader = Reader(model, variables, batch_size, chunk)
        self._codec = tokenizer
        self._vocab = model.config.vocab_size
        self._max_length = max_length
        self._key = jax.random.key(seed)
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's separator.

        Raises:
            ValueError: It has none that the model knows.
        """
        end = self._codec.separator
        if end is None or end >= self._vocab:
            raise ValueError(
                f"tokenizer={self._codec.name!r} has no token for the end of a text among the model's {self._vocab}, "
                "which an empty context and a whole text begin with; leave out tasks that have them, or use another"
            )
        return end

    @property
    def tokenizer_name(self) -> str:
        return self._codec.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return check_ids(self._codec.encode(string), self._vocab, self._codec.name).tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation after its context, and whether greedy decoding writes it.

        How a pair is cut into tokens is the harness's: its text is encoded as a whole, and a blank that ends the
        context counts as part of the continuation.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [self._fit(self._begin(context), _ids(continuation)) for _, context, continuation in requests]
        scores = self._reader.scores(pairs, "loglikelihood", self._progress)
        return [(value, greedy) for value, greedy in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of each text, its first token being predicted from the separator.

        The text is read in one pass: every token is predicted from all that the model keeps of those before it.
        """
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            windows = [([self.eot_token_id], tokens)]
            if self._max_length is not None:
                spans = get_rolling_token_windows(tokens, self.eot_token_id, self._max_length, 1)
                windows = [make_disjoint_window(span) for span in spans]
            pairs += [(_ids(context), _ids(rest)) for context, rest in windows]
            owner += [number] * len(windows)
        totals = np.zeros(len(requests))
        scores = self._reader.scores(pairs, "loglikelihood_rolling", self._progress)
        np.add.at(totals, owner, [score.log_likelihood for score in scores])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continues each context up to one of its stop strings, the end of the text, or a number of tokens.

        Raises:
            ValueError: A request has an option that this does not know.
        """
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for place, (content, numbers) in enumerate(alike.items()):
            until, new, options = _options(json.loads(content))
            texts = [requests[number].args[0] for number in numbers]
            contexts = [self._fit(self._begin(self.tok_encode(text)), np.zeros(new, np.int32))[0] for text in texts]
            written = self._reader.write(
                contexts,
                new,
                ended=lambda ids, until=until: any(stop in self._text(ids) for stop in until),  # type: ignore[misc]
                stop_tokens=self._ends(),
                key=jax.random.fold_in(self._key, place),
                label="generate_until",
                progress=self._progress,
                **options,
            )
            for number, ids in zip(numbers, written, strict=True):
                text = self._text(ids)
                cuts = [text.find(stop) for stop in until if stop in text]
                answers[number] = text[: min(cuts, default=len(text))]
        return answers

    def _begin(self, context: Sequence[int]) -> np.ndarray:
        """A context that has a token; blanks alone leave none to one that the harness has cut."""
        return _ids(context if len(context) else [self.prefix_token_id])

    def _fit(self, context: np.ndarray, continuation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both, the context without what is too much for `max_length`; the last token is never read."""
        if self._max_length is None:
            return context, continuation
        room = self._max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"max_length={self._max_length} is less than the {len(continuation)} tokens of a continuation; give "
                "more, or leave it out"
            )
        return context[-room:], continuation

    def _ends(self) -> tuple[int, ...]:
        end = self._codec.separator
        return () if end is None or end >= self._vocab else (end,)

    def _text(self, ids: np.ndarray) -> str:
        """Text of an answer, without the token that ended it."""
        return self._codec.decode(ids[:-1] if len(ids) and ids[-1] in self._ends() else ids)


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def _options(given: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Stop strings, number of tokens, and the arguments of `Reader.write`, of what the harness calls gen_kwargs."""
    rest = dict(given)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name) for name in _LENGTHS if name in rest]
    new = next((int(length) for length in lengths if length is not None), MAX_GEN_TOKS)
    sample = rest.pop("do_sample", None)
    temperature = float(rest.pop("temperature", 1.0 if sample else 0.0))
    options: dict[str, Any] = {"temperature": 0.0 if sample is False else temperature}
    options |= {name: rest.pop(name) for name in ("top_k", "top_p") if name in rest}
    if rest:
        raise ValueError(
            f"generation_kwargs has {', '.join(sorted(rest))}, which is not known here; it may hold until, do_sample, "
            f"temperature, top_k, top_p and {_LENGTHS[0]}"
        )
    stops = [until] if isinstance(until, str) else list(until)
    return [stop for stop in stops if stop], new, options
