"""Continues a text, or answers questions about one: `python -m experiments.generate --checkpoint DIR ...`.

Texts are read in pieces, and by the model in chunks with the state carried on, so a file of any length takes the same
memory (but for full attention, whose cache grows with the text). Answers go to the standard output, everything else to
the standard error.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments.chat import Chat, Plain, Turns, read_settings
from experiments.checkpoint import CheckpointError, load_model
from experiments.command import run_command
from experiments.config import TrainConfig, reading_mesh
from experiments.conversation import Answer, Codec, Reader, Style
from experiments.data import DataError, load_tokenizer
from experiments.data.levels import LevelData
from experiments.data.questions import QuestionData
from experiments.data.tokenizers import Literal, encode_pieces
from experiments.files import location, run_folder
from experiments.measures import check_positive
from experiments.saved_state import check_target, load_state, origin, save_state
from experiments.stored import find_checkpoint
from fam_jax import MeshConfig, StreamState
from fam_jax.sampling import check_choice

PIECE = 1 << 13  # bytes of a prompt file that are in memory at a time; between them the progress bar stands still


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


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues a text, or answers questions about one, with a trained model.

    Attributes:
        checkpoint: Folder of a run, or one checkpoint in it.
        prompt: The text to continue, or what is asked.
        prompt_file: The same from a UTF-8 text file or pipe of any length, such as /dev/stdin.
        question: Several prompts, each answered as if it were the only one.
        interactive: Prompts are lines of the standard input, a conversation until its end (Ctrl-D).
        context_file: Text files or pipes of any length to read before, one after the other.
        save_state: File to keep the state in after that, so that it need not be read again.
        load_state: File of a state to begin with.
        chat: Put prompts, and the context before the first, into the chat template of the model's tokenizer.
        system: A message to begin the chat with, which says how to answer.
        max_new_tokens: Length of the answer, which may end before at an end of text.
        stop: Texts that end an answer.
        temperature: 0 takes the most likely token each time; above, samples.
        top_k: Sample among the k most likely tokens only.
        top_p: Sample among the fewest most likely tokens that together have this probability.
        min_p: Sample among tokens only that have at least this share of the most likely one's probability.
        repetition_penalty: Above 1, tokens of prompts and answers, not of context, become less likely.
        seed: Of the sampling.
        chunk: Tokens of the prompt read at a time.
        mesh: How the devices are used, as in training.
    """

    checkpoint: Path
    prompt: str | None = None
    prompt_file: Path | None = None
    question: tuple[str, ...] = ()
    interactive: bool = False
    context_file: tuple[Path, ...] = ()
    save_state: Path | None = None
    load_state: Path | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    chunk: int = 512
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(
    options: Options,
    show: Callable[[str], None] = lambda text: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Answer | None:
    """Reads, with a progress bar on a terminal, and answers.

    Args:
        options: What.
        show: Gets answers as they are written, part by part, and the end of the line after each.
        tell: Gets a line on everything else that was done.

    Returns:
        The last answer; None if nothing was asked.

    Raises:
        ValueError: An option, a text or its file cannot be used.
        CheckpointError: See `load_model`.
    """
    _check(options)
    size = _characters(options)
    mesh = reading_mesh(options.mesh)
    checkpoint: Path = options.checkpoint
    meta: dict[str, Any] = {}
    if options.save_state is not None or options.load_state is not None:
        checkpoint, meta, _ = find_checkpoint(options.checkpoint)
    model, variables, config = load_model(checkpoint, mesh=mesh)
    tokenizer, folder = tokenizer_of(config, checkpoint)
    settings = read_settings(tokenizer, folder)
    turns: Turns = Chat(settings, options.system) if options.chat else Plain()
    style = {field.name: getattr(options, field.name) for field in dataclasses.fields(Style) if field.name != "ends"}
    reader = Reader(model, variables, Style(ends=settings.ends, **style))
    # A chat that begins with a document has a head, which a state has read.
    about = origin(meta, tokenizer, turns.head()) if meta else {}
    bar = tqdm(total=size, unit="char", unit_scale=True, disable=None, leave=False)
    state: StreamState | None = None
    tokens = 0
    with jax.set_mesh(mesh):
        if options.load_state is not None:
            state, tokens = load_state(options.load_state, model, about)
            tell(f"begins after {tokens:,} tokens, from {options.load_state}")
        if options.context_file:
            pieces = encode_pieces(Literal(tokenizer), counted(_joined(options.context_file), bar))
            if state is None:
                pieces = begun(chain(encode_pieces(tokenizer, [turns.head()]), pieces), settings.bos)
            with bar:
                start = time.perf_counter()
                state, count = reader.read(pieces, state)
                jax.block_until_ready(state)
            tokens += count
            tell(f"read {count:,} tokens of context in {time.perf_counter() - start:.1f} s; {_size(state)}")
        if options.save_state is not None:
            assert state is not None
            save_state(options.save_state, state, about, tokens)
            tell(f"wrote {options.save_state}")

        def ask(texts: Iterable[str], before: Answer | None = None, turn: int = 0) -> Answer:
            start = time.perf_counter()
            pieces = encode_pieces(tokenizer, texts)
            now = state if before is None else before.state
            answer = reader.answer(
                begun(pieces, settings.bos) if now is None else pieces,
                tokenizer.decode,
                now,
                seen=None if before is None else before.seen,
                key=jax.random.fold_in(jax.random.key(options.seed), turn) if turn else jax.random.key(options.seed),
                show=show,
            )
            show("\n")
            tell(
                f"read {answer.prompt_tokens:,} tokens, wrote {len(answer.ids):,}, in "
                f"{time.perf_counter() - start:.1f} s; {_size(answer.state)}"
            )
            return answer

        answer: Answer | None = None
        if options.prompt_file is not None and not options.chat:
            with bar:
                return ask(counted(text_pieces(options.prompt_file), bar))
        for question in _questions(options):
            if options.question:
                tell(f"question: {question}")
            answer = ask([turns.first(question, document=state is not None)])
        if options.interactive:
            for turn, line in enumerate(_lines()):
                question = line.rstrip("\n") if options.chat else line
                if answer is None:
                    text = turns.first(question, document=state is not None)
                else:
                    text = turns.later(question, tokenizer.decode(answer.ids[-1:]))
                answer = ask([text], answer, turn)
        return answer


def tokenizer_of(config: TrainConfig, checkpoint: Path | str) -> tuple[Codec, Path]:
    """The tokenizer of a run's data and the folder that its settings are in.

    One in the run's folder, as pretrained models have it, goes with the run wherever that is moved.
    """
    folder = run_folder(checkpoint)
    if isinstance(config.data, QuestionData):
        return config.data.task().tokenizer, folder
    given = getattr(config.data, "tokenizer", "words")
    if isinstance(config.data, LevelData) and given == "words":
        return config.data.load_tokenizer(), folder
    for own in (folder / "tokenizer.json", folder / "tokenizer.model"):
        if own.exists():
            return load_tokenizer(str(own)), folder
    return load_tokenizer(given), location(given).parent


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.generate", description=Options.__doc__)

    def show(text: str) -> None:
        print(text, end="", flush=True)

    def tell(line: str) -> None:
        print(f"[{line}]", file=sys.stderr, flush=True)

    try:
        run(options, show, tell)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(options: Options) -> None:
    """Raises a ValueError for what is known to be wrong before a model is loaded or a long text read."""
    given = {
        "--prompt TEXT": options.prompt is not None,
        "--prompt-file FILE": options.prompt_file is not None,
        "--question TEXT": bool(options.question),
        "--interactive": options.interactive,
    }
    if sum(given.values()) > 1 or (not any(given.values()) and options.save_state is None):
        *most, last = given
        raise ValueError(f"give either {', '.join(most)} or {last}")
    for name, texts in (("prompt", (options.prompt,)), ("question", options.question), ("stop", options.stop)):
        if "" in texts:
            raise DataError(f"--{name} is empty; a {'text to stop at' if name == 'stop' else 'prompt'} needs some text")
    if options.save_state is not None:
        if not options.context_file:
            raise ValueError("--save-state keeps what was read with --context-file FILE; give that too")
        check_target(options.save_state)
    if options.system is not None and not options.chat:
        raise ValueError("--system is a message of a chat; add --chat, or leave it out")
    pipes = [path for path in (*options.context_file, options.prompt_file) if path == Path("/dev/stdin")]
    if len(pipes) + options.interactive > 1:
        raise ValueError("/dev/stdin can be read only once; put one of the texts into a file")
    check_positive(max_new_tokens=options.max_new_tokens, top_k=options.top_k, chunk=options.chunk)
    limits = (options.top_p, options.min_p, options.repetition_penalty)
    check_choice(options.top_k or 1, options.temperature, options.top_k, *limits)  # any vocabulary has so many
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed={options.seed} is not allowed; it must be at least 0 and below 2**63")


def _characters(options: Options) -> int | None:
    """How many will be read in pieces; None if it is not known, as of pipes, which can be read only once.

    Wrong files are told here, before the model loads.
    """
    paths = [*options.context_file, *(() if options.prompt_file is None else (options.prompt_file,))]
    files = [path.is_file() or not path.exists() for path in paths]
    sizes = [sum(map(len, text_pieces(path))) for path, file in zip(paths, files, strict=True) if file]
    return sum(sizes) if all(files) else None


def _questions(options: Options) -> tuple[str, ...]:
    if options.prompt_file is not None:  # the template takes it in one piece
        return ("".join(text_pieces(options.prompt_file)),)
    return options.question if options.prompt is None else (options.prompt,)


def _lines() -> Iterator[str]:
    """Lines of the standard input that are not blank; on a terminal with a sign that it is the reader's turn."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line


def _joined(paths: Iterable[Path]) -> Iterator[str]:
    """The texts of files, one after the other; each begins a line."""
    for number, path in enumerate(paths):
        if number:
            yield "\n"
        yield from text_pieces(path)


def begun(pieces: Iterable[np.ndarray], bos: int | None) -> Iterator[np.ndarray]:
    """The ids of a text from its beginning, with the token that begins texts unless it is there or is not used."""
    first = True
    for ids in pieces:
        if first and len(ids):
            first = False
            if bos is not None and ids[0] != bos:
                yield np.array([bos], np.int32)
        yield ids


def counted(texts: Iterable[str], bar: tqdm) -> Iterator[str]:
    """Moves the bar on when a piece has been read."""
    for text in texts:
        yield text
        bar.update(len(text))


def state_bytes(state: StreamState) -> int:
    """The size of all that has been kept of a text."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _size(state: StreamState) -> str:
    return f"the state has {state_bytes(state):,} bytes"


if __name__ == "__main__":
    run_command(main)
