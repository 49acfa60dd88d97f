"""Reads problems from files, by their layout, and reports everything that is wrong with them at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from sae_rl.data.layouts import LAYOUTS, Layout
from sae_rl.data.rows import BrokenRow, Row, parse_rows, shown
from sae_rl.data.shaping import Shape

Duplicates = Literal["error", "drop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A source: what a file or a data set holds. Rows that name no reward or task of their own get these."""

    path: str
    reward: str
    task: str
    layout: Layout = LAYOUTS["own"]
    shape: Shape = field(default_factory=Shape)
    duplicates: Duplicates = "error"
    split: str | None = None
    subset: str | None = None
    num_prompts: int | None = None  # the first so many; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One problem, checked but not tokenized."""

    id: str
    prompt: str | list[dict[str, Any]]  # text, or chat messages
    answer: str
    reward: str
    task: str
    where: str  # in its file


def read_records(file: File, check_reward: Callable[[str], object]) -> tuple[list[Record], list[str]]:
    """Every good row of a file, in order.

    Args:
        check_reward: raises ValueError if a row's own reward does not exist.

    Returns:
        The records, and what is wrong with other rows: a line for each.

    Raises:
        ValueError: the file is missing, empty, cut or of another kind.
    """
    if file.duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates: found {file.duplicates!r}, allowed are 'error' and 'drop'")
    layout = file.layout
    first_seen: dict[str, str] = {}

    def parse(row: Row, where: str) -> Record | None:
        record = Record(
            id=_optional_text(row, layout.id, where),
            prompt=file.shape(prompt_at(row, layout.prompt)),
            answer=_answer(row, layout),
            reward=_optional_text(row, layout.reward, file.reward),
            task=_optional_text(row, layout.task, file.task),
            where=where,
        )
        if record.reward != file.reward:
            _check_reward(record.reward, layout.reward, check_reward)
        if record.id in first_seen:
            if file.duplicates == "drop":
                return None
            raise BrokenRow(
                f"id {record.id!r} was used in {first_seen[record.id]} already; make ids differ, or set duplicates to 'drop'"
            )
        first_seen[record.id] = where
        return record

    records, problems = parse_rows(file.path, parse, file.split, file.subset)
    return [record for record in records if record is not None], problems


def _check_reward(reward: str, column: str, check: Callable[[str], object]) -> None:
    try:
        check(reward)
    except ValueError as error:
        raise BrokenRow(f"{column!r}: {str(error).removeprefix('reward: ')}") from error


def text_at(row: Row, path: str) -> str:
    """The text in a column.

    Raises:
        BrokenRow: there is no such column, or it holds something else.
    """
    if not isinstance(value := _lookup(row, path), str):
        raise BrokenRow(f"{path!r} must be text, found {shown(value)}")
    return value


def prompt_at(row: Row, path: str) -> str | list[dict[str, Any]]:
    """The prompt in a column: text, or chat messages.

    Raises:
        BrokenRow: there is no such column, or it holds something else.
    """
    value = _lookup(row, path)
    if not isinstance(value, list):
        if not text_at(row, path).strip():
            raise BrokenRow(f"{path!r} is empty")
        return str(value)
    good = [isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value]
    if not value or not all(good):
        bad = shown(value[good.index(False)]) if value else "none"
        raise BrokenRow(f"{path!r} must be text or a list of {{role, content}} messages, found {bad}")
    return value


def _answer(row: Row, layout: Layout) -> str:
    """Text as it is; anything else as JSON, for verifiers that need more than a word."""
    if layout.gold is not None:
        return layout.gold(text_at(row, layout.answer))
    value = _lookup(row, layout.answer)
    if value is None:
        raise BrokenRow(f"{layout.answer!r} must hold an answer, found null")
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except TypeError as error:
        raise BrokenRow(f"{layout.answer!r} must be text, or fit into JSON: {error}") from error


def _optional_text(row: Row, path: str, default: str) -> str:
    try:
        value = _lookup(row, path)
    except BrokenRow:
        return default
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BrokenRow(f"{path!r} must be text or a whole number, found {shown(value)}")
    return str(value)


def _lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; a column whose own name holds dots goes first."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping):
            raise BrokenRow(f"no column {path!r}: {key!r} would be inside {shown(value)}")
        if key not in value:
            nearest = get_close_matches(key, value, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise BrokenRow(f"no column {path!r}: found {', '.join(map(repr, value)) or 'nothing'}{hint}")
        value = value[key]
    return value
