"""The rows of JSONL, of parquet and of Hugging Face data sets, each with its place; and every broken one by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
Rows = Iterator[tuple[str, "Row | BrokenRow"]]  # (where, what)
MAX_REPORTED = 50  # broken rows that an error names one by one
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class BrokenRow(ValueError):
    """What is wrong with one row, without saying which."""


def parse_rows(
    path: str,
    parse: Callable[[Row, str], T | None],
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> tuple[list[T], list[str]]:
    """``parse(row, where)`` of every row that is good; it reports what is wrong by raising `BrokenRow`, and leaves a row
    out with None.

    Args:
        path: a JSONL or parquet file, a folder of ``datasets.save_to_disk``, or a name on the Hugging Face hub.
        split: of a Hugging Face data set that has several.
        subset: of one on the hub that has several.
        limit: the first so many are enough, and what lies behind them is not read; None: all.

    Returns:
        What was parsed, and what is wrong: lines that name every broken row, empty if none is.

    Raises:
        ValueError: there is nothing of that name, or it is empty, cut, or of another kind.
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
    """The lines of a message: none without a problem, and not thousands with thousands."""
    more = [f"... and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
    return [title, *(f"  {line}" for line in (*problems[:MAX_REPORTED], *more))] if problems else []


def _rows(path: str, split: str | None, subset: str | None) -> Rows:
    kinds = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    file = Path(path)
    if file.is_dir():
        _only_of_the_hub(path, subset=subset)
        return _saved_rows(path, split)
    if file.is_file() or file.suffix in kinds:
        if file.suffix not in kinds:
            raise ValueError(
                f"{path}: found a file ending in {file.suffix!r}, allowed: {', '.join(kinds)}, a folder of "
                "datasets.save_to_disk, or the name of a data set on the hub"
            )
        if not file.is_file():
            raise ValueError(f"{path}: there is no such file")
        _only_of_the_hub(path, split=split, subset=subset)
        return kinds[file.suffix](file)
    if not HUB_NAME.fullmatch(path):
        raise ValueError(f"{path}: there is no such file or folder")
    return _hub_rows(path, split, subset)


def _only_of_the_hub(path: str, **given: str | None) -> None:
    for key, value in given.items():
        if value is not None:
            raise ValueError(f"{path}: {key} = {value!r}, but it holds one data set; set {key} to null")


def _jsonl_rows(file: Path) -> Rows:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> Row | BrokenRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BrokenRow(f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return BrokenRow(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # a number of thousands of digits
        return BrokenRow(f"not read: {error}")
    except RecursionError:
        return BrokenRow("not read: its brackets are nested too deeply")
    return row if isinstance(row, dict) else BrokenRow(f"must be an object, found {shown(row)}")


def _parquet_rows(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a parquet file, or one that was cut: {error}") from error
    try:
        for chunk in table.iter_batches():
            for row in _python_rows(chunk):
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: cannot be read behind row {number}; it may have been cut: {error}") from error


def _python_rows(chunk: Any) -> Iterator[Row | BrokenRow]:
    try:
        yield from chunk.to_pylist()
    except UnicodeDecodeError:  # somewhere: which row is it?
        for index in range(chunk.num_rows):
            try:
                yield chunk.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BrokenRow(f"not UTF-8: {error.object[:60]!r}")


def _saved_rows(folder: str, split: str | None) -> Rows:
    import pyarrow
    from datasets import DatasetDict, load_from_disk

    number = 0
    try:
        saved = load_from_disk(folder)
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"split = {split!r}: choose one of {', '.join(map(repr, saved))}")
            saved = saved[split]
        elif split is not None:
            raise ValueError(f"split = {split!r}, but it holds one data set; set split to null")
        for row in saved:
            number += 1
            yield f"row {number}", row
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: it is a folder, but not a whole one of datasets.save_to_disk ({error})") from error
    except IndexError:  # of datasets, which cannot read what it saved of a data set without rows
        return
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        behind = f"cannot be read behind row {number}: " if number else ""
        raise ValueError(f"{folder}: {behind}{error}") from error


def _hub_rows(name: str, split: str | None, subset: str | None) -> Rows:
    from datasets import Dataset, load_dataset

    try:
        loaded = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such name, subset or split
        raise ValueError(
            f"{name}: there is no such file or folder, and the hub gave no data set of that name "
            f"({str(error).strip().splitlines()[0]}). Without a network: save it where there is one, with "
            "datasets.load_dataset(...).save_to_disk(FOLDER), and name that folder"
        ) from error
    if not isinstance(loaded, Dataset):
        raise ValueError(f"{name}: split = {split!r}: choose one of {', '.join(map(repr, loaded))}")
    for number, row in enumerate(loaded, start=1):
        yield f"row {number}", row


def shown(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
