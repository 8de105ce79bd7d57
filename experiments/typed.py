"""Typed settings: checks of the fields of config dataclasses; and JSON, of settings and of what is measured."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

T = TypeVar("T")

# What a field of a dataclass once held, and what that is today.
ONCE: dict[tuple[str, str], dict[Any, Any]] = {("DecoderConfig", "remat"): {False: "none", True: "full"}}


def check_types(config: Any) -> None:
    """Checks that every field of a dataclass holds what its annotation says.

    A float may be given as an integer, and is finite.

    Raises:
        ValueError: One does not; the message names the field, the value and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(
                f"{type(config).__name__}.{field.name}={value!r} is not allowed; it must be {_allowed(hint)}"
            )


def _fits(value: Any, hint: Any) -> bool:
    for member in _members(hint):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if origin is Literal:
            good = value in args
        elif origin is tuple:
            each = [args[0]] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else list(args)
            good = isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
        elif member is float:
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        elif member in (bool, int, str):
            good = type(value) is member
        else:
            good = isinstance(value, member)
        if good:
            return True
    return False


def _allowed(hint: Any) -> str:
    return " or ".join(
        "a finite number" if member is float else getattr(member, "__name__", str(member)) for member in _members(hint)
    )


def to_json(value: Any, where: str = "value") -> Any:
    """Turns dataclasses, mappings, arrays, NumPy scalars, tuples and paths into what JSON can hold.

    Where a field may hold one of several dataclasses, "type" tells which, so that `from_json` reads a config back.
    Floats that are not finite become None, as JSON has no word for them.

    Raises:
        ValueError: Something has no JSON form; the message says where.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        out = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            tagged = dataclasses.is_dataclass(item) and len(_dataclasses(hints[field.name])) > 1
            made = to_json(item, f"{where}.{field.name}")
            out[field.name] = {"type": type(item).__name__, **made} if tagged else made
        return out
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{where}.{key}") for key, item in value.items()}
    if hasattr(value, "__array__"):
        return to_json(np.asarray(value).tolist(), where)
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"{where} is a {type(value).__name__}, which has no JSON form; give numbers, text, lists")


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
    values = {name: _today(cls.__name__, name, value) for name, value in values.items()}
    return cls(**{name: _decode(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def _today(owner: str, name: str, value: Any) -> Any:
    """A value as the field has it today; as it is, if it always was so."""
    once = ONCE.get((owner, name), {})
    return once[value] if isinstance(value, bool) and value in once else value


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
    raise ValueError(f"{where}={value!r} is not allowed; it must be {_allowed(hint)}")
