"""Reads the rows of JSON, CSV, parquet and Hugging Face data sets, and reports every broken row with its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sae_rl.data.hub import HUB_NAME, files_on_hub

T = TypeVar("T")
Row = dict[str, Any]
Rows = Iterator[tuple[str, "Row | BrokenRow"]]  # (place such as "line 3", row)
MAX_REPORTED = 50  # broken rows that one message lists
MAX_CSV_CHARACTERS = 2**31 - 1  # the library's own limit of 131,072 for one value refuses long prompts
# What follows the name of a split in the names of its files: -00000-of-00002, perhaps with a hash, _1, or Spark's parts.
SHARD = re.compile(r"(?<=^part)-\d.*|[-_.]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")
SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # files of datasets.save_to_disk


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
        path: a file of `READERS`, a folder of such files or of ``datasets.save_to_disk``, or a name on the hub.
        split: the split of a folder or a data set with several splits.
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
    file = Path(path)
    if not file.exists() and _kind(file) not in READERS and HUB_NAME.fullmatch(path):
        return _placed(path, "row", _hub_rows(path, split, subset))
    if not file.exists():
        raise ValueError(f"{path}: there is no such file{'' if _kind(file) in READERS else ' or folder'}")
    if subset is not None:
        raise ValueError(f"{path}: subset = {subset!r}, but it holds one data set; set subset to null")
    if file.is_dir():
        if shards := _shards(file, split):
            return ((f"{file.name} {where}", row) for file in shards for where, row in _file_rows(file))
        return _placed(path, "row", _saved_rows(path, split))
    if _kind(file) not in READERS:
        raise ValueError(
            f"{path}: found a file ending in {file.suffix!r}, allowed: {', '.join(READERS)} (.gz too, except for parquet), "
            "a folder of them or of datasets.save_to_disk, or the name of a data set on the hub"
        )
    if split is not None:
        raise ValueError(f"{path}: split = {split!r}, but it holds one data set; set split to null")
    return _file_rows(file)


def _kind(file: Path) -> str:
    """The ending of a file's name that says how to read it, without ``.gz``."""
    inside = Path(file.stem).suffix
    return inside if file.suffix == ".gz" and inside != ".parquet" else file.suffix


def _file_rows(file: Path) -> Rows:
    unit, read = READERS[_kind(file)]
    return _placed(str(file), unit, read(file))


def _shards(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, in the order of their names; none if it is no folder of `READERS`'s files.

    Raises:
        ValueError: the folder has files of several kinds, or other splits.
    """
    by_split: dict[str, list[Path]] = {}
    if not any((folder / name).exists() for name in SAVED):
        for file in sorted(folder.glob("[!.]*")):
            if _kind(file) in READERS:
                name = file.name.partition(_kind(file))[0]
                by_split.setdefault(SHARD.sub("", name), []).append(file)
    if len(kinds := sorted({_kind(file) for files in by_split.values() for file in files})) > 1:
        raise ValueError(
            f"{folder}: it holds files of several kinds ({', '.join(kinds)}); list those to read: path=[...]"
        )
    if by_split and split not in by_split and (split is not None or len(by_split) > 1):
        raise ValueError(f"{folder}: split = {split!r}: choose one of {', '.join(map(repr, by_split))}")
    return by_split[split] if split in by_split else [file for files in by_split.values() for file in files]


def _placed(path: str, unit: str, rows: Iterator[Row | BrokenRow | None]) -> Rows:
    """Adds the place of each row. None is counted, but it is no row. Raises ValueError if the rows cannot be read."""
    import pyarrow

    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if row is not None:
                yield f"{unit} {number}", row
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        behind = f" behind {unit} {number}; it may have been cut" if number else ""
        raise ValueError(f"{path}: cannot be read{behind}: {error}") from error


def _open(file: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _jsonl_rows(file: Path) -> Iterator[Row | BrokenRow | None]:
    with _open(file) as lines:
        yield from map(_json_row, lines)


def _json_rows(file: Path) -> Iterator[Row | BrokenRow | None]:
    """The objects of an array. Many files with this ending have an object in each line instead."""
    with _open(file) as opened:
        text = opened.read().removeprefix(codecs.BOM_UTF8)
    if not text.lstrip().startswith(b"["):
        yield from map(_json_row, text.splitlines())
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON array: {error}") from error
    yield from (row if isinstance(row, dict) else _no_object(row) for row in rows)


def _csv_rows(file: Path) -> Iterator[Row | BrokenRow | None]:
    """Every value is the text that is in the file. The first row has the names of the columns."""
    csv.field_size_limit(MAX_CSV_CHARACTERS)
    with _open(file) as opened:
        rows = csv.reader(io.TextIOWrapper(opened, "utf-8-sig", newline=""), strict=True)
        try:
            names = next(rows, [])
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        if len(names) == 1 and (used := [mark for mark in ";\t|" if mark in names[0]]):
            raise ValueError(f"{file}: found one column, {names[0]!r}; separate columns by commas, not by {used[0]!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: two columns have one name: {', '.join(names)}")
        for row in rows:
            if row and len(row) != len(names):
                yield BrokenRow(f"has {len(row)} values, but the first row names {len(names)} columns")
            else:
                yield dict(zip(names, row, strict=True)) if row else None


def _json_row(line: bytes) -> Row | BrokenRow | None:
    if not line.strip():
        return None
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
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(row: object) -> BrokenRow:
    return BrokenRow(f"must be an object, found {shown(row)}")


def _parquet_rows(file: Path) -> Iterator[Row | BrokenRow]:
    from pyarrow import parquet

    for chunk in parquet.ParquetFile(file).iter_batches():
        for struct in chunk.to_struct_array():
            try:
                yield struct.as_py()
            except UnicodeDecodeError as error:
                yield BrokenRow(f"not UTF-8: {error.object[:60]!r}")


# The ending of a file's name -> the unit that places are counted in, and what reads the rows.
READERS: dict[str, tuple[str, Callable[[Path], Iterator[Row | BrokenRow | None]]]] = {
    ".jsonl": ("line", _jsonl_rows),
    ".json": ("row", _json_rows),
    ".csv": ("row", _csv_rows),
    ".parquet": ("row", _parquet_rows),
}


def _saved_rows(folder: str, split: str | None) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: it is a folder, but not a whole one of datasets.save_to_disk ({error}), and none of its files ends "
            f"in {', '.join(READERS)}"
        ) from error
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
    from huggingface_hub import is_offline_mode

    try:
        if not is_offline_mode():
            files_on_hub(name, "dataset")
        loaded = load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no network, or no such name, subset or split
        raise ValueError(
            f"{name}: there is no such file or folder, and the hub gave no data set of that name "
            f"({str(error).strip().splitlines()[0]}). Without a network: save it where there is one, with "
            "datasets.load_dataset(...).save_to_disk(FOLDER), and name that folder; HF_HUB_OFFLINE=1 takes what was "
            "downloaded here before"
        ) from error
    if not isinstance(loaded, Dataset):
        raise ValueError(f"{name}: split = {split!r}: choose one of {', '.join(map(repr, loaded))}")
    yield from loaded


def shown(value: Any) -> str:
    """A value as a message shows it: JSON of at most 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
