"""The config of a training run: typed, frozen, checked before anything is compiled, and kept as JSON."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from experiments.data import TextData, load_tokenizer
from experiments.data.arithmetic import ArithmeticData
from experiments.data.passkey import PasskeyData
from experiments.data.prosqa import ProsqaData
from experiments.optim import OptimConfig, make_schedule
from fam_jax import DecoderConfig

T = TypeVar("T")

# What may differ when a run is continued; the trainer prints what does. Everything else makes it another run.
MAY_CHANGE = re.compile(
    r"name|steps|eval_every|eval_steps|checkpoint_every|keep|log_every|work_dir|z_loss|optim\.(?!optimizer).*"
    r"|model\.(schedule|remat|scan_layers)|data\.(data_dir|tfds_dir)"
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: Name of the run; its files go to `runs/NAME` unless `work_dir` says otherwise.
        model: The decoder.
        data: Where the batches come from.
        optim: Optimiser and schedule.
        steps: Updates in all.
        seed: Seed of the initial parameters and of all randomness of training. The data has its own.
        z_loss: Weight of the squared log-partition in the loss, which keeps logits from drifting; 0 is off.
        log_every: Steps from one line of metrics to the next.
        eval_every: Steps from one evaluation on the validation split to the next; 0 is never, else once more
            at the end.
        eval_steps: Batches of an evaluation, always the same ones.
        checkpoint_every: Steps from one checkpoint to the next; the end always has one, and 0 is only there.
        keep: Checkpoints kept; older ones are deleted.
        work_dir: Folder of checkpoints, metrics and the config; None is `runs/NAME`.
    """

    name: str
    model: DecoderConfig
    data: TextData | PasskeyData | ArithmeticData | ProsqaData
    steps: int
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    seed: int = 0
    z_loss: float = 0.0
    log_every: int = 10
    eval_every: int = 200
    eval_steps: int = 16
    checkpoint_every: int = 200
    keep: int = 2
    work_dir: str | None = None

    def __post_init__(self) -> None:
        minimum = {"steps": 1, "log_every": 1, "eval_steps": 1, "keep": 1}
        for field in ("steps", "seed", "log_every", "eval_every", "eval_steps", "checkpoint_every", "keep"):
            value, least = getattr(self, field), minimum.get(field, 0)
            if value < least:
                raise ValueError(f"TrainConfig.{field}={value!r} is not allowed; it must be at least {least}")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"TrainConfig.z_loss={self.z_loss!r} is not allowed; it must be at least 0")
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise ValueError(
                f"TrainConfig.name={self.name!r} is not allowed; it names a folder, so it needs letters and no slash"
            )

    @property
    def directory(self) -> Path:
        """Where the run's files go."""
        return Path(self.work_dir or Path("runs") / self.name).expanduser()

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
    if isinstance(data, TextData):
        tokenizer = load_tokenizer(data.tokenizer)
        vocabulary, what, shortest = tokenizer.vocab_size, f"data.tokenizer={data.tokenizer!r}", data.length
    elif isinstance(data, PasskeyData):
        vocabulary, what, shortest = data.vocab_size, "the PassKey task", data.blocks[0] * data.block_size
        if config.eval_every:
            raise ValueError(
                f"eval_every={config.eval_every} is not allowed: PassKey has no validation split, since "
                "every training batch is of new samples; set eval_every to 0 and measure with "
                "experiments.evaluate"
            )
    else:
        vocabulary, what, shortest = data.vocab_size, f"the {data.task().tokenizer.name} task", data.length
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
    if memory is not None and memory.rsp:
        if not memory.fam_length:
            raise ValueError(
                f"model.memory.rsp={memory.rsp} passes the FAM on, but model.memory.fam_length=0 has none; "
                "set rsp to 0 or give the model a FAM"
            )
        if shortest < memory.block_size:
            raise ValueError(
                f"rows of {shortest} tokens hold no complete block of {memory.block_size} tokens "
                "(model.memory.block_size), so Random State Passing (model.memory.rsp) would have nothing to "
                "store; make the rows longer or set rsp to 0"
            )


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able values; where several dataclasses may stand, "type" tells which."""
    hints = typing.get_type_hints(type(config))

    def encode(value: Any, hint: Any) -> Any:
        if dataclasses.is_dataclass(value):
            tag = {"type": type(value).__name__} if len(_dataclasses(hint)) > 1 else {}
            return {**tag, **to_json(value)}
        return [encode(item, Any) for item in value] if isinstance(value, tuple) else value

    return {f.name: encode(getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)}


def from_json(values: Any, cls: type[T], where: str = "config") -> T:
    """The config of type `cls` that `to_json` wrote. A field that is missing takes its default.

    Raises:
        ValueError: A key is unknown, missing, or holds a value of the wrong type or that is not allowed.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r} is not allowed; {cls.__name__} needs an object with its fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}.{key} is not known; {cls.__name__} has {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{name} is missing; {cls.__name__} needs it")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _decode(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON configs differ: (dotted field, before, now), in order; what is missing is None."""
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _dataclasses(hint: Any) -> dict[str, type]:
    classes = [member for member in _members(hint) if isinstance(member, type)]
    return {member.__name__: member for member in classes if dataclasses.is_dataclass(member)}


def _decode(value: Any, hint: Any, where: str) -> Any:
    members, classes = _members(hint), _dataclasses(hint)
    if value is None and type(None) in members:
        return None
    if classes:
        if len(classes) == 1:
            return from_json(value, next(iter(classes.values())), where)
        tag = value.get("type") if isinstance(value, dict) else None
        if tag not in classes:
            raise ValueError(f"{where}.type={tag!r} is not known; it must be one of {', '.join(classes)}")
        return from_json({k: v for k, v in value.items() if k != "type"}, classes[tag], where)
    for member in members:
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin is tuple and isinstance(value, list):
            each = [args[0]] * len(value) if args[-1] is Ellipsis else args
            return tuple(
                _decode(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, each, strict=True))
            )
        if origin is Literal and value in args:
            return value
        if member is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if member in (bool, int, float, str) and type(value) is member:
            return value
    allowed = " or ".join(getattr(member, "__name__", str(member)) for member in members)
    raise ValueError(f"{where}={value!r} is not allowed; it must be {allowed}")
