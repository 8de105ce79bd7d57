"""The config of a training run: typed, frozen, checked before anything is compiled, and kept as JSON."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from experiments.data import TextData, load_tokenizer
from experiments.data.arithmetic import ArithmeticData
from experiments.data.babi import BabiData
from experiments.data.levels import LevelData
from experiments.data.pairs import PairsData
from experiments.data.passkey import PasskeyData
from experiments.data.prosqa import ProsqaData
from experiments.data.tracking import TrackingData
from experiments.files import location
from experiments.optim import OptimConfig, make_schedule
from experiments.typed import check_types
from fam_jax import DecoderConfig, MeshConfig, make_mesh

# What may differ when a run is continued; the trainer prints what does. Everything else makes it another run.
MAY_CHANGE = re.compile(
    r"name|steps|eval_every|eval_steps|checkpoint_every|keep(_every|_best)?|log_every|profile|work_dir|accumulate|z_loss"
    r"|optim\.(?!optimizer).*"
    r"|model\.(schedule|attention|remat|scan_layers|sharding\..*)|mesh\..*|data\.(data_dir|tfds_dir)"
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: Name of the run; its files go to `runs/NAME` unless `work_dir` says otherwise.
        model: The decoder.
        data: Where the batches come from.
        optim: Optimiser and schedule.
        steps: Updates in all; 0 keeps the parameters as they begin.
        seed: Seed of the initial parameters and of all randomness of training. The data has its own.
        accumulate: Parts that a batch is divided into, whose gradients are added up one after another: less memory for
            the same step, but for its random draws.
        z_loss: Weight of the squared log-partition in the loss, which keeps logits from drifting; 0 is off.
        log_every: Steps from one line of metrics to the next.
        eval_every: Steps from one evaluation on the validation split to the next; 0 is never, else once more
            at the end.
        eval_steps: Batches of an evaluation, always the same ones.
        checkpoint_every: Steps from one checkpoint to the next; the end always has one, and 0 is only there.
        keep: The latest so many checkpoints are kept, others deleted; except that the one that a process continued from
            stays as long as it runs.
        keep_every: Checkpoints of steps that are multiples of this are kept for good; 0 is none.
        keep_best: So many checkpoints of the lowest validation loss are kept, too. Each checkpoint needs an evaluation.
        init_from: A run, or one checkpoint of it, whose parameters this run begins with. Its model may have another
            memory, mixing or lora: FAM is added to a trained model so, or its length changed.
        prompt_token: With `init_from` of a model without a FAM: the token that the FAM prompt begins like, best the one
            that texts begin with. None: noise as large as embeddings are.
        train_mixing: With `model.lora`, train what mixes layers, too, beside LoRA and the FAM prompt.
        work_dir: Folder of checkpoints, metrics and the config, also in object storage (`gs://BUCKET/...`); None is
            `runs/NAME`.
        mesh: How the devices are used; what goes over which of its axes is `model.sharding`.
        profile: First and last step of a trace that goes to `profile/` in the run's folder, e.g. 10 12.
    """

    name: str
    model: DecoderConfig
    data: TextData | PasskeyData | PairsData | TrackingData | BabiData | ArithmeticData | ProsqaData
    steps: int
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    seed: int = 0
    accumulate: int = 1
    z_loss: float = 0.0
    log_every: int = 10
    eval_every: int = 200
    eval_steps: int = 16
    checkpoint_every: int = 200
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    init_from: str | None = None
    prompt_token: int | None = None
    train_mixing: bool = False
    work_dir: str | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        minimum = {"accumulate": 1, "log_every": 1, "eval_steps": 1, "keep": 1}
        for field in (
            "steps",
            "seed",
            "accumulate",
            "log_every",
            "eval_every",
            "eval_steps",
            "checkpoint_every",
            "keep",
            "keep_every",
            "keep_best",
        ):
            value, least = getattr(self, field), minimum.get(field, 0)
            if value < least:
                raise ValueError(f"TrainConfig.{field}={value!r} is not allowed; it must be at least {least}")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"TrainConfig.keep_every={self.keep_every} is not allowed; it must be a multiple of "
                f"checkpoint_every={self.checkpoint_every}, or 0"
            )
        if self.keep_best and (not self.eval_every or self.checkpoint_every % self.eval_every):
            raise ValueError(
                f"TrainConfig.keep_best={self.keep_best} is not allowed; checkpoint_every={self.checkpoint_every} must "
                f"be a multiple of eval_every={self.eval_every}, so that each has a validation loss"
            )
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1] <= self.steps:
            raise ValueError(
                f"TrainConfig.profile={self.profile!r} is not allowed; give the first and the last step, between 1 and "
                f"steps={self.steps}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"TrainConfig.seed={self.seed} is not allowed; it must be below 2**63")
        if self.data.batch_size % self.accumulate:
            raise ValueError(
                f"TrainConfig.accumulate={self.accumulate} is not allowed; it must divide "
                f"data.batch_size={self.data.batch_size}"
            )
        if self.z_loss < 0:
            raise ValueError(f"TrainConfig.z_loss={self.z_loss!r} is not allowed; it must be at least 0")
        token = self.prompt_token
        if token is not None and not (self.init_from and self.model.fam_length and 0 <= token < self.model.vocab_size):
            raise ValueError(
                f"TrainConfig.prompt_token={token} is not allowed; it must be below model.vocab_size="
                f"{self.model.vocab_size}, and needs init_from and a FAM, whose prompt begins like it"
            )
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise ValueError(
                f"TrainConfig.name={self.name!r} is not allowed; it names a folder, so it needs letters and no slash"
            )

    @property
    def directory(self) -> Path:
        """Where the run's files go."""
        return location(self.work_dir or Path("runs") / self.name)

    @property
    def stream(self) -> bool:
        """Whether rows carry their state from step to step."""
        return getattr(self.data, "mode", "packed") == "stream"


def check(config: TrainConfig) -> None:
    """Checks what the parts of a config must agree on. Reads the tokenizer, compiles nothing.

    Raises:
        ValueError: They do not; the message names the fields, their values and what to do.
    """
    make_schedule(config.optim, config.steps)
    memory, data = config.model.memory, config.data
    tokenizer: Any
    if isinstance(data, TextData):
        tokenizer = load_tokenizer(data.tokenizer)
        vocabulary, what, shortest = tokenizer.vocab_size, f"data.tokenizer={data.tokenizer!r}", data.length
    elif isinstance(data, LevelData):
        data.check_levels()
        tokenizer = data.load_tokenizer()
        vocabulary, what = tokenizer.vocab_size, f"the {data.title} task"
        shortest = data.row_blocks(data.levels[0]) * data.block_size
        if config.eval_every:
            raise ValueError(
                f"eval_every={config.eval_every} is not allowed: {what} has no validation split, since "
                "every training batch is of new samples; set eval_every to 0 and measure with "
                "experiments.evaluate"
            )
        data.check_model(config.model)
    else:
        vocabulary, what, shortest = data.vocab_size, f"the {data.task().tokenizer.name} task", data.length
    if config.train_mixing and (config.model.lora is None or config.model.mixing is None):
        raise ValueError(
            "train_mixing=True is not allowed without both model.lora and model.mixing; set it to False: without LoRA "
            "all parameters train"
        )
    if config.model.vocab_size < vocabulary:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is too small for {what}, which has {vocabulary} "
            f"ids; set model.vocab_size to at least {vocabulary}"
        )
    if config.stream and memory is None:
        raise ValueError(
            "data.mode='stream' carries a state of constant size from step to step, which full attention "
            "(model.memory=None) has not; give the model a memory or use data.mode='packed'"
        )
    if isinstance(data, TextData) and config.stream and memory is not None and memory.block_size != data.block_size:
        raise ValueError(
            f"data.block_size={data.block_size} and model.memory.block_size={memory.block_size} differ, but "
            "in stream mode documents start where the model's blocks do; set both to the same value"
        )
    if memory is not None and memory.rsp and shortest < memory.block_size:
        raise ValueError(
            f"rows of {shortest} tokens hold no complete block of {memory.block_size} tokens "
            "(model.memory.block_size), so Random State Passing (model.memory.rsp) would have nothing to "
            "store; make the rows longer or set rsp to 0"
        )


def check_mesh(config: TrainConfig, mesh: Mesh) -> None:
    """Checks that rows of the data can be spread over the mesh's `sequence` axis.

    Raises:
        ValueError: They cannot.
    """
    size, memory, data = mesh.shape["sequence"], config.model.memory, config.data
    if size == 1 or "sequence" not in config.model.sharding.block:
        return
    if isinstance(data, LevelData):
        raise ValueError(
            f"mesh.sequence={size} is not allowed with the {data.title} task, whose rows grow block by block; set "
            "mesh.sequence to 1"
        )
    if memory is None or config.model.schedule != "layer":
        what = "full attention (model.memory=None)" if memory is None else f"model.schedule={config.model.schedule!r}"
        raise ValueError(
            f"mesh.sequence={size} is not allowed with {what}: what it spreads is the blocks of the layer schedule; "
            "set mesh.sequence to 1"
        )
    if data.length % (size * memory.block_size):
        raise ValueError(
            f"data.length={data.length} is not allowed with mesh.sequence={size}: it must be a multiple of "
            f"{size} x {memory.block_size} (model.memory.block_size) = {size * memory.block_size} tokens"
        )


def reading_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a program that reads texts of any length with a trained model.

    Raises:
        ValueError: It does not fit the devices, or would spread texts, whose lengths must fit it then.
    """
    mesh = make_mesh(config)
    if mesh.shape["sequence"] > 1:
        raise ValueError(
            f"mesh.sequence={mesh.shape['sequence']} is for training only, where all rows have one length; set "
            "--mesh.sequence to 1, and --mesh.fsdp, --mesh.data or --mesh.tensor to more"
        )
    return mesh
