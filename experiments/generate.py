"""Continues a text: `python -m experiments.generate --checkpoint DIR --prompt-file FILE`.

The prompt is read in pieces, and by the model in chunks with the state carried on, so a file of any length
takes the same memory (but for full attention, whose cache grows with the text). The answer goes to the
standard output, everything else to the standard error.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import tyro
from jax import Array
from tqdm import tqdm

from experiments.checkpoint import CheckpointError, load_model
from experiments.command import run_command
from experiments.config import TrainConfig, reading_mesh
from experiments.data import DataError, load_tokenizer
from experiments.data.passkey import PasskeyData, PasskeyTokenizer
from experiments.data.questions import QuestionData
from experiments.data.tokenizers import encode_pieces
from experiments.measures import check_positive
from experiments.spread import as_before, initial_state
from fam_jax import Decoder, MeshConfig, StreamState, generate
from fam_jax.call import check_ids

PIECE = 1 << 16  # bytes of a prompt file that are in memory at a time


class Codec(Protocol):
    """What is needed of a tokenizer here; those of text may have a `separator`, which ends an answer."""

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `continue_text` returns.

    Attributes:
        text: The new text.
        ids: Its tokens, int32 [t].
        prompt_tokens: Tokens of the prompt.
        state: Has read the prompt and the new tokens.
    """

    text: str
    ids: np.ndarray
    prompt_tokens: int
    state: StreamState


def text_pieces(path: str | Path, size: int = PIECE) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about `size` bytes that end at a line's end where there is one.

    Raises:
        DataError: the file cannot be read, is empty, or is not UTF-8 text.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, empty, read = "", True, 0
    try:
        with open(path, "rb") as file:
            while data := file.read(size):
                text = rest + decoder.decode(data)
                if "\0" in text:
                    raise DataError(f"{path}: binary, not text (it holds NUL bytes); give a UTF-8 text file")
                empty = empty and not text.strip()
                read += len(data)
                cut = text.rfind("\n") + 1 or len(text)
                rest = text[cut:]
                if cut:
                    yield text[:cut]
            rest += decoder.decode(b"", final=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} near byte {read + error.start}); convert it first"
        ) from None
    if empty and not rest.strip():
        raise DataError(f"{path}: empty; a prompt needs some text")
    if rest:
        yield rest


def continue_text(
    model: Decoder,
    variables: Any,
    tokenizer: Codec,
    texts: Iterable[str],
    max_new_tokens: int,
    *,
    chunk: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
) -> Answer:
    """Reads a prompt and continues it.

    Args:
        model: The decoder.
        variables: Its parameters.
        tokenizer: That of its training.
        texts: The prompt in pieces, tokenized as if it came at once.
        max_new_tokens: The answer ends here, or at the tokenizer's end of text.
        chunk: Tokens that the model reads at a time, rounded up to whole blocks.
        temperature: See `fam_jax.generate`, so for the others.
        top_k: Sample among the k most likely only.
        top_p: Sample among the most likely of this joint probability only.
        key: Random key; needed if the temperature is above 0.

    Raises:
        ValueError: the prompt is empty or has ids that the model does not know, or an option is impossible.
    """
    check_positive(chunk=chunk)
    memory, vocab = model.config.memory, model.config.vocab_size
    size = chunk if memory is None else -(-chunk // memory.block_size) * memory.block_size
    pieces: Iterator[np.ndarray] = (check_ids(ids, vocab, "prompt") for ids in encode_pieces(tokenizer, texts))
    if memory is None:  # the cache is made for the whole text, so its length must be known
        pieces = iter([np.concatenate([np.zeros(0, np.int32), *pieces])])
    state: StreamState | None = None
    count, held = 0, np.zeros(0, np.int32)
    for piece in pieces:
        held = np.concatenate([held, piece])
        if state is None:
            # The last piece is padded to `size`, for which a cache must have room too.
            state = initial_state(model, 1, max(size, len(held) + max_new_tokens) if memory is None else None)
        # The last tokens stay behind: what follows them is what is asked for.
        full = max(len(held) - 1, 0) // size * size
        for start in range(0, full, size):
            state = _advance(model, variables, state, held[None, start : start + size])
        count, held = count + len(piece), held[full:]
    if count == 0:
        raise ValueError("the prompt has no token; give some text")
    end = getattr(tokenizer, "separator", None)
    out = generate(
        model,
        variables,
        np.pad(held, (0, size - len(held)))[None],  # one shape for prompts of all lengths
        max_new_tokens,
        lengths=np.array([len(held)]),
        state=state,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=() if end is None or end >= vocab else (end,),
        key=key,
    )
    ids = np.asarray(out.ids)[0, : int(out.lengths[0])]
    return Answer(tokenizer.decode(ids[:-1] if len(ids) and ids[-1] == end else ids), ids, count, out.state)


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues a text with a trained model.

    Attributes:
        checkpoint: Folder of a run, or one checkpoint in it.
        prompt: The text to continue; this or prompt-file.
        prompt_file: A UTF-8 text file or pipe of any length, such as /dev/stdin.
        max_new_tokens: Length of the answer, which may end before at an end of text.
        temperature: 0 takes the most likely token each time; above, samples.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the fewest most likely tokens that together have this probability.
        seed: Of the sampling.
        chunk: Tokens of the prompt read at a time.
        mesh: How the devices are used, as in training.
    """

    checkpoint: Path
    prompt: str | None = None
    prompt_file: Path | None = None
    max_new_tokens: int = 200
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    chunk: int = 512
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(options: Options) -> Answer:
    """Reads the prompt, with a progress bar on a terminal, and continues it.

    Raises:
        ValueError: an option, the prompt or its file cannot be used.
        CheckpointError: see `load_model`.
    """
    _check(options)
    characters: int | None = None
    if options.prompt_file is not None:
        texts = text_pieces(options.prompt_file)
        # A wrong file is told before the model loads; a pipe can be read only once.
        if options.prompt_file.is_file() or not options.prompt_file.exists():
            characters = sum(map(len, text_pieces(options.prompt_file)))
    else:
        assert options.prompt is not None
        if not options.prompt:
            raise DataError("--prompt is empty; a prompt needs some text")
        characters, texts = len(options.prompt), iter([options.prompt])
    mesh = reading_mesh(options.mesh)
    model, variables, config = load_model(options.checkpoint, mesh=mesh)
    tokenizer = tokenizer_of(config)
    bar = tqdm(total=characters, unit="char", unit_scale=True, disable=None, leave=False)
    with bar, jax.set_mesh(mesh):
        return continue_text(
            model,
            variables,
            tokenizer,
            _counted(texts, bar),
            options.max_new_tokens,
            chunk=options.chunk,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            key=jax.random.key(options.seed),
        )


def tokenizer_of(config: TrainConfig) -> Codec:
    """The tokenizer of a run's data."""
    if isinstance(config.data, QuestionData):
        return config.data.task().tokenizer
    return PasskeyTokenizer() if isinstance(config.data, PasskeyData) else load_tokenizer(config.data.tokenizer)


def main() -> int:
    """The command line; returns the exit code."""
    start = time.perf_counter()
    options = tyro.cli(Options, prog="python -m experiments.generate", description=Options.__doc__)
    try:
        answer = run(options)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(answer.text)
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(answer.state))
    print(
        f"[read {answer.prompt_tokens:,} tokens, wrote {len(answer.ids):,}, in {seconds:.1f} s; "
        f"the state has {size:,} bytes]",
        file=sys.stderr,
    )
    return 0


def _check(options: Options) -> None:
    """Raises a ValueError for what is known to be wrong before a long prompt is read.

    `fam_jax.generate` checks what needs the model.
    """
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("give either --prompt TEXT or --prompt-file FILE")
    check_positive(max_new_tokens=options.max_new_tokens, top_k=options.top_k, chunk=options.chunk)
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed={options.seed} is not allowed; it must be at least 0 and below 2**63")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"temperature={options.temperature} is not allowed; it must be at least 0")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"top_p={options.top_p} is not allowed; it must be above 0 and at most 1")


def _counted(texts: Iterable[str], bar: tqdm) -> Iterator[str]:
    """Moves the bar on when a piece has been read."""
    for text in texts:
        yield text
        bar.update(len(text))


@partial(jax.jit, static_argnums=0)
def _advance(model: Decoder, variables: Any, state: StreamState, tokens: Array) -> StreamState:
    """The state after whole blocks [1, t] of a prompt; the unused logits are not computed."""
    out: Any = model.apply(variables, tokens, state, aligned=model.config.memory is not None)
    return as_before(model, out.state)


if __name__ == "__main__":
    run_command(main)
