"""What every setting shares: sections of a configuration, members of extension points by name, and errors a person can fix."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
UNKNOWN_KEY = "unknown_key"  # the type of pydantic's error about a key that a section does not have


class ConfigError(ValueError):
    """What is wrong with a configuration, one problem per line, each with the key to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))


class BadKeys(ValueError):
    """What is wrong with the keys of a source, a line for each; a line begins with the key."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, node: Any) -> Any:
        if isinstance(node, Mapping) and (unknown := [key for key in node if key not in cls.model_fields]):
            problem = "; ".join(f"has no {key!r}, {cls.hint(str(key))}" for key in unknown)
            raise PydanticCustomError(UNKNOWN_KEY, "{problem}", {"problem": problem})
        return node

    @classmethod
    def hint(cls, key: str) -> str:
        """What to write instead of a key that is not there."""
        return nearest(key, list(cls.model_fields))


def tag(name: str) -> str:
    """Of a member of a union: pydantic puts it into the keys of errors, where `describe` leaves it out."""
    return f"<{name}>"


def nearest(word: str, allowed: list[str]) -> str:
    """ ", did you mean 'x'?" or the list of what is allowed."""
    match = get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f"did you mean {match[0]!r}?" if match else f"allowed: {', '.join(sorted(set(allowed)))}"


def member_of(table: Mapping[str, type[Any]], requires: str | None = None) -> Callable[[object], object]:
    """Builds one member of an extension point from ``{name: ..., knob: value}``.

    ``name`` is a key of ``table`` or the import path ``package.module:Class`` of a user's own frozen dataclass, which can
    be called and has the attribute ``requires``.
    """

    def build(node: object) -> object:
        if not isinstance(node, Mapping):
            raise ValueError(f"found {node!r}, but it must be a mapping with a name")
        knobs = dict(node)
        name = knobs.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"name is missing; allowed: {', '.join(sorted(table))}, or package.module:Class")
        cls = import_object(name) if ":" in name else table.get(name)
        if cls is None:
            raise ValueError(f"name {name!r} is unknown, {nearest(name, list(table))}")
        if not dataclasses.is_dataclass(cls):
            raise ValueError(f"{name} is not a dataclass; write it as a frozen dataclass whose fields are its knobs")
        if "__call__" not in dir(cls):
            raise ValueError(f"{name} has no method __call__")
        if requires is not None and not hasattr(cls, requires):
            raise ValueError(f"{name} has no attribute {requires}, which must be true or false")
        fields = [f.name for f in dataclasses.fields(cls) if f.init]
        for knob in knobs:
            if knob not in fields:
                raise ValueError(f"{name} has no knob {knob!r}, {nearest(knob, fields)}")
        knobs = {knob: _with_members(value, build) for knob, value in knobs.items()}
        try:
            return TypeAdapter(cls).validate_python(knobs)
        except ValidationError as error:
            raise ValueError("; ".join(describe(error))) from None

    return build


def _with_members(value: object, build: Callable[[object], object]) -> object:
    """A knob that is a member itself, or a list of them, as in a union of segmenters."""
    if isinstance(value, Mapping) and "name" in value:
        return build(value)
    return [_with_members(item, build) for item in value] if isinstance(value, list) else value


def tree_of(member: Any, table: Mapping[str, type[Any]]) -> dict[str, Any]:
    """What `member_of` builds a member from: its name and its knobs as plain values."""
    names = {cls: name for name, cls in table.items()}
    cls = type(member)
    knobs = {field.name: _plain(getattr(member, field.name), table) for field in dataclasses.fields(member)}
    return {"name": names.get(cls, f"{cls.__module__}:{cls.__qualname__}")} | knobs


def _plain(value: Any, table: Mapping[str, type[Any]]) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item, table) for item in value]
    return tree_of(value, table) if dataclasses.is_dataclass(value) else value


def import_object(path: str) -> Any:
    """``package.module:attribute`` -> the attribute.

    Raises:
        ValueError: no such module or attribute.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {path!r}: {error}") from error


def describe(error: ValidationError) -> list[str]:
    """One line per problem: the key, what was found, what is allowed."""
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(part for part in parts if part != tag(part[1:-1]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{key} is missing")
        elif problem["type"] == UNKNOWN_KEY:
            lines.append(f"{key} {message}" if key else f"the configuration {message}")
        elif key and problem["type"] == "value_error":
            lines.append(f"{key}: {message}")
        elif key:
            lines.append(f"{key}: found {problem['input']!r}: {message[0].lower() + message[1:]}")
        else:
            lines.append(message)
    return lines
