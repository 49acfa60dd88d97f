"""Reads the rows of JSONL, parquet and Hugging Face data sets, and reports every broken row with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
Rows = Iterator[tuple[str, "Row | BrokenRow"]]  # (place such as "line 3", row)
MAX_REPORTED = 50  # broken rows that one message lists
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class BrokenRow(ValueError):
    """What is wrong with a row. The message does not name the row."""


def parse_rows(
    path: str,
    parse: Callable[[Row, str], T | None],
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> tuple[list[T], list[str]]:
    """Calls ``parse(row, where)`` for every row. ``parse`` raises `BrokenRow`, or returns None to leave the row out.

    Args:
        path: a JSONL or parquet file, a folder of ``datasets.save_to_disk``, or a name on the Hugging Face hub.
        split: the split of a Hugging Face data set with several splits.
        subset: the subset of a data set on the hub with several subsets.
        limit: stop after so many parsed rows; None: read all.

    Returns:
        The parsed rows, and lines that name every broken row.

    Raises:
        ValueError: the file or data set does not exist, is empty or truncated, or has another format.
    """
    parsed: list[T] = []
    broken: list[str] = []
    num_rows = 0
    for where, row in _rows(path, split, subset):
        num_rows += 1
        try:
            if isinstance(row, BrokenRow):
                raise row
            if (made := parse(row, where)) is not None:
                parsed.append(made)
        except BrokenRow as error:
            broken.append(f"{where}: {error}")
        if len(parsed) == limit:
            break
    if num_rows == 0:
        raise ValueError(f"{path}: it holds no rows")
    return parsed, listed(f"{path}: {len(broken)} of {num_rows} rows are broken", broken)


def listed(title: str, problems: Sequence[str]) -> list[str]:
    """The title and the problems as lines of a message, at most `MAX_REPORTED`; no line without a problem."""
    more = [f"... and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
    return [title, *(f"  {line}" for line in (*problems[:MAX_REPORTED], *more))] if problems else []


def _rows(path: str, split: str | None, subset: str | None) -> Rows:
    kinds = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    file = Path(path)
    if not file.exists() and file.suffix not in kinds and HUB_NAME.fullmatch(path):
        return _placed(path, "row", _hub_rows(path, split, subset))
    if not file.exists():
        raise ValueError(f"{path}: there is no such file{'' if file.suffix in kinds else ' or folder'}")
    if subset is not None:
        raise ValueError(f"{path}: subset = {subset!r}, but it holds one data set; set subset to null")
    if file.is_dir():
        return _placed(path, "row", _saved_rows(path, split))
    if file.suffix not in kinds:
        raise ValueError(
            f"{path}: found a file ending in {file.suffix!r}, allowed: {', '.join(kinds)}, a folder of "
            "datasets.save_to_disk, or the name of a data set on the hub"
        )
    if split is not None:
        raise ValueError(f"{path}: split = {split!r}, but it holds one data set; set split to null")
    return _placed(path, "line" if file.suffix == ".jsonl" else "row", kinds[file.suffix](file))


def _placed(path: str, unit: str, rows: Iterator[Row | BrokenRow | None]) -> Rows:
    """Adds the place of each row. None is counted, but it is no row. Raises ValueError if the rows cannot be read."""
    import pyarrow

    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if row is not None:
                yield f"{unit} {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        behind = f" behind {unit} {number}; it may have been cut" if number else ""
        raise ValueError(f"{path}: cannot be read{behind}: {error}") from error


def _jsonl_rows(file: Path) -> Iterator[Row | BrokenRow | None]:
    with file.open("rb") as lines:
        for line in lines:
            yield _json_row(line) if line.strip() else None


def _json_row(line: bytes) -> Row | BrokenRow:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())  # behind a line's end json counts columns anew
    except UnicodeDecodeError as error:
        return BrokenRow(f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return BrokenRow(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # Python refuses a number of thousands of digits
        return BrokenRow(f"not read: {error}")
    except RecursionError:
        return BrokenRow("not read: its brackets are nested too deeply")
    return row if isinstance(row, dict) else BrokenRow(f"must be an object, found {shown(row)}")


def _parquet_rows(file: Path) -> Iterator[Row | BrokenRow]:
    from pyarrow import parquet

    for chunk in parquet.ParquetFile(file).iter_batches():
        for struct in chunk.to_struct_array():
            try:
                yield struct.as_py()
            except UnicodeDecodeError as error:
                yield BrokenRow(f"not UTF-8: {error.object[:60]!r}")


def _saved_rows(folder: str, split: str | None) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: it is a folder, but not a whole one of datasets.save_to_disk ({error})") from error
    except IndexError:  # the library cannot read its own file of a data set without rows
        return
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder}: split = {split!r}: choose one of {', '.join(map(repr, saved))}")
        saved = saved[split]
    elif split is not None:
        raise ValueError(f"{folder}: split = {split!r}, but it holds one data set; set split to null")
    yield from saved


def _hub_rows(name: str, split: str | None, subset: str | None) -> Iterator[Row]:
    from datasets import Dataset, load_dataset

    try:
        loaded = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no network, or no such name, subset or split
        raise ValueError(
            f"{name}: there is no such file or folder, and the hub gave no data set of that name "
            f"({str(error).strip().splitlines()[0]}). Without a network: save it where there is one, with "
            "datasets.load_dataset(...).save_to_disk(FOLDER), and name that folder"
        ) from error
    if not isinstance(loaded, Dataset):
        raise ValueError(f"{name}: split = {split!r}: choose one of {', '.join(map(repr, loaded))}")
    yield from loaded


def shown(value: Any) -> str:
    """A value as a message shows it: JSON of at most 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
