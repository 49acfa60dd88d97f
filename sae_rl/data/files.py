"""Reads problems from JSONL and parquet files, and reports everything that is wrong with them at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Duplicates = Literal["error", "drop"]
MAX_REPORTED = 50  # broken rows that an error names one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMap:
    """Where a row keeps what we need; a dot goes into a nested object, as in ``reward_model.ground_truth``.

    Required: ``prompt`` and ``answer``. A row without the other columns gets its position in the file as id, and the
    reward and the task of the source.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    id: str = "id"
    reward: str = "reward"
    task: str = "task"


# DAPO-Math-17k as published, which holds every problem many times: read it with duplicates="drop".
DAPO_MATH = ColumnMap(answer="reward_model.ground_truth", id="extra_info.index", task="data_source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row of a file, checked but not tokenized."""

    id: str
    prompt: str | list[dict[str, Any]]  # text, or chat messages
    answer: str
    reward: str
    task: str


class BrokenRow(ValueError):
    """What is wrong with one row, without saying which."""


def read_records(
    path: str, columns: ColumnMap, reward: str, task: str, duplicates: Duplicates = "error"
) -> list[Record]:
    """Every row of a JSONL or parquet file, in order.

    Raises:
        ValueError: the file is missing, empty or of another kind, or rows are broken; names all of them.
    """
    if duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates: found {duplicates!r}, allowed are 'error' and 'drop'")
    first_seen: dict[str, str] = {}

    def parse(row: dict[str, Any], where: str) -> Record | None:
        record = Record(
            id=_optional_text(row, columns.id, where),
            prompt=prompt_at(row, columns.prompt),
            answer=_answer(row, columns.answer),
            reward=_optional_text(row, columns.reward, reward),
            task=_optional_text(row, columns.task, task),
        )
        if record.id in first_seen:
            if duplicates == "drop":
                return None
            raise BrokenRow(
                f"id {record.id!r} was used in {first_seen[record.id]} already; make ids differ, or set duplicates to 'drop'"
            )
        first_seen[record.id] = where
        return record

    return [record for record in parse_rows(path, parse) if record is not None]


def parse_rows(path: str, parse: Callable[[dict[str, Any], str], T]) -> list[T]:
    """``parse(row, where)`` of every row; it reports what is wrong by raising `BrokenRow`.

    Raises:
        ValueError: the file is missing, empty or of another kind, or rows are broken; names all of them.
    """
    kinds = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    file = Path(path)
    if file.suffix not in kinds:
        raise ValueError(f"{path}: found a file ending in {file.suffix!r}, allowed: {', '.join(kinds)}")
    if not file.is_file():
        raise ValueError(f"{path}: there is no such file" + (", it is a folder" if file.is_dir() else ""))
    parsed: list[T] = []
    broken: list[str] = []
    num_rows = 0
    for where, row in kinds[file.suffix](file):
        num_rows += 1
        try:
            if isinstance(row, BrokenRow):
                raise row
            parsed.append(parse(row, where))
        except BrokenRow as error:
            broken.append(f"{where}: {error}")
    if num_rows == 0:
        raise ValueError(f"{path}: the file holds no rows")
    if broken:
        more = [f"... and {len(broken) - MAX_REPORTED} more"] if len(broken) > MAX_REPORTED else []
        lines = "\n".join(f"  {line}" for line in (*broken[:MAX_REPORTED], *more))
        raise ValueError(f"{path}: {len(broken)} of {num_rows} rows are broken\n{lines}")
    return parsed


def text_at(row: dict[str, Any], path: str) -> str:
    """The text in a column.

    Raises:
        BrokenRow: there is no such column, or it holds something else.
    """
    if not isinstance(value := _lookup(row, path), str):
        raise BrokenRow(f"{path!r} must be text, found {_shown(value)}")
    return value


def _jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | BrokenRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BrokenRow(f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return BrokenRow(f"not JSON: {error.msg} at column {error.colno}")
    return row if isinstance(row, dict) else BrokenRow(f"must be an object, found {_shown(row)}")


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | BrokenRow]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a parquet file: {error}") from error
    number = 0
    for chunk in table.iter_batches():
        for row in chunk.to_pylist():
            number += 1
            yield f"row {number}", row


def _lookup(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; a column whose own name holds dots goes first."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict):
            raise BrokenRow(f"no column {path!r}: {key!r} would be inside {_shown(value)}")
        if key not in value:
            nearest = get_close_matches(key, value, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise BrokenRow(f"no column {path!r}: found {', '.join(map(repr, value)) or 'nothing'}{hint}")
        value = value[key]
    return value


def _optional_text(row: dict[str, Any], path: str, default: str) -> str:
    try:
        value = _lookup(row, path)
    except BrokenRow:
        return default
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BrokenRow(f"{path!r} must be text or a whole number, found {_shown(value)}")
    return str(value)


def prompt_at(row: dict[str, Any], path: str) -> str | list[dict[str, Any]]:
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
        bad = _shown(value[good.index(False)]) if value else "none"
        raise BrokenRow(f"{path!r} must be text or a list of {{role, content}} messages, found {bad}")
    return value


def _answer(row: dict[str, Any], path: str) -> str:
    """Text as it is; anything else as JSON, for verifiers that need more than a word."""
    value = _lookup(row, path)
    if value is None:
        raise BrokenRow(f"{path!r} must hold an answer, found null")
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
