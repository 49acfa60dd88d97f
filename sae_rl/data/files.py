"""Reads problems from files, by their layout, and reports everything that is wrong with them at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from sae_rl.data.layouts import LAYOUTS, Layout
from sae_rl.data.rows import BrokenRow, Row, parse_rows, shown
from sae_rl.data.templates import Shape

logger = logging.getLogger(__name__)

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


def read_records(
    file: File, check_reward: Callable[[str], object], limit: int | None = None
) -> tuple[list[Record], list[str]]:
    """Every good row of a file, in order.

    Args:
        check_reward: raises ValueError if a row's own reward does not exist.
        limit: the first so many are enough; None: all.

    Returns:
        The records, and what is wrong with other rows: a line for each.

    Raises:
        ValueError: the file is missing, empty, cut or of another kind.
    """
    if file.duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates: found {file.duplicates!r}, allowed are 'error' and 'drop'")
    reader = _Reader(file, check_reward)
    records, problems = parse_rows(file.path, reader, file.split, file.subset, limit)
    if reader.num_dropped:
        logger.warning("%s: %d rows were dropped, whose ids were there before", file.path, reader.num_dropped)
    return records, problems + [f"{file.path}: {line}" for line in reader.missing_columns()]


class _Reader:
    """Makes records of rows, and remembers what only all of them can tell."""

    def __init__(self, file: File, check_reward: Callable[[str], object]) -> None:
        self._file, self._check_reward = file, check_reward
        self._first: dict[str, Record] = {}  # by id
        self._found: set[str] = set()  # columns that a row may lack, and that one had
        self._last: Row = {}
        self.num_dropped = 0

    def __call__(self, row: Row, where: str) -> Record | None:
        """A problem; None: one that was there before. Raises BrokenRow."""
        file, layout = self._file, self._file.layout
        self._last = row
        record = Record(
            id=self._optional_text(row, layout.id, where),
            prompt=file.shape(prompt_at(row, layout.prompt)),
            answer=_answer(row, layout),
            reward=self._optional_text(row, layout.reward, file.reward),
            task=self._optional_text(row, layout.task, file.task),
            where=where,
        )
        if record.reward != file.reward:
            _check_reward(record.reward, layout.reward, self._check_reward)
        first = self._first.setdefault(record.id, record)
        if first is record:
            return record
        if (first.prompt, first.answer) != (record.prompt, record.answer):
            raise BrokenRow(
                f"id {record.id!r} was used in {first.where} already, with another prompt or answer; make ids differ, or "
                "name another column in columns.id"
            )
        if file.duplicates == "error":
            raise BrokenRow(
                f"id {record.id!r} was used in {first.where} already; make ids differ, or set duplicates to 'drop'"
            )
        self.num_dropped += 1
        return None

    def _optional_text(self, row: Row, path: str, default: str) -> str:
        try:
            value = _lookup(row, path)
        except BrokenRow:
            return default
        self._found.add(path)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise BrokenRow(f"{path!r} must be text or a whole number, found {shown(value)}")
        return _checked(str(value), path)

    def missing_columns(self) -> list[str]:
        """Columns that were asked for by name and that no row has."""
        layout = self._file.layout
        optional = {"id": layout.id, "reward": layout.reward, "task": layout.task}
        problems = []
        for name, path in optional.items():
            if self._last and name in layout.named and path not in self._found:
                try:
                    _lookup(self._last, path)
                except BrokenRow as error:
                    problems.append(f"columns.{name}: {error}")
        return problems


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
    return _checked(value, path)


def _checked(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenRow(
            f"{path!r} holds half a character (U+{ord(text[error.start]):04X}), which neither tokenizers nor files take"
        ) from error
    return text


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
    for message in value:
        _checked(message["content"], path)
    return value


def _answer(row: Row, layout: Layout) -> str:
    """Text as it is; anything else as JSON, for verifiers that need more than a word."""
    if layout.gold is not None:
        return layout.gold(text_at(row, layout.answer))
    value = _lookup(row, layout.answer)
    if value is None:
        raise BrokenRow(f"{layout.answer!r} must hold an answer, found null")
    try:
        return _checked(value, layout.answer) if isinstance(value, str) else json.dumps(value)
    except TypeError as error:
        raise BrokenRow(f"{layout.answer!r} must be text, or fit into JSON: {error}") from error


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
