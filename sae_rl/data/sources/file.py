"""Prompts from a file or a data set: JSONL, parquet, a folder of ``datasets.save_to_disk``, or the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from sae_rl.data.columns import LAYOUTS, Columns, answer_at, checked_text, prompt_at, text_at, value_at
from sae_rl.data.loader import Loader
from sae_rl.data.prompts import Record
from sae_rl.data.rows import BrokenRow, Row, parse_rows, shown
from sae_rl.data.sources.source import ShapedSource
from sae_rl.settings import Positive, key_of
from sae_rl.types import Prompt

logger = logging.getLogger(__name__)


class FileSource(ShapedSource):
    name: Literal["file"]
    path: str
    split: str | None = None  # of a Hugging Face data set with several splits
    subset: str | None = None  # of a data set on the hub with several subsets, such as main of openai/gsm8k
    layout: Annotated[str, AfterValidator(key_of(LAYOUTS))] = "own"
    columns: Columns = Columns()
    reward: str  # of rows that name none: a verifier of sae_rl.rewards.table, or package.module:function
    duplicates: Literal["error", "drop"] = "error"  # rows that repeat the id, the prompt and the answer of another row
    num_prompts: Positive | None = None  # only the first so many; null: all

    def prompts(self, loader: Loader) -> list[Prompt]:
        return loader.load(self.path, self.reward, lambda: self._records(loader), self.num_prompts)

    def _records(self, loader: Loader) -> tuple[list[Record], list[str]]:
        """The good rows, and a line for each broken one. Raises ValueError if the file cannot be read."""
        reader = _Reader(self, loader.check_reward)
        # If prompts may be dropped, nobody knows yet how many rows num_prompts takes.
        limit = None if loader.overlong == "drop" else self.num_prompts
        records, problems = parse_rows(self.path, reader, self.split, self.subset, limit)
        if reader.num_dropped:
            logger.warning("%s: %d rows were dropped, whose ids were there before", self.path, reader.num_dropped)
        return records, problems + [f"{self.path}: {line}" for line in reader.missing_columns()]


class _Reader:
    """Turns rows into records. It remembers ids, and the columns that no row had."""

    def __init__(self, source: FileSource, check_reward: Callable[[str], object]) -> None:
        self._source, self._check_reward = source, check_reward
        self._gold = LAYOUTS[source.layout].gold
        self._columns = LAYOUTS[source.layout].names(source.columns)
        self._task = Path(source.path).stem
        self._first: dict[str, Record] = {}  # by id
        self._found: set[str] = set()  # optional columns that at least one row had
        self._last: Row = {}
        self.num_dropped = 0

    def __call__(self, row: Row, where: str) -> Record | None:
        """The record of a row, or None if the row is a duplicate to drop. Raises BrokenRow."""
        self._last = row
        columns, answer = self._columns, self._columns["answer"]
        record = Record(
            id=self._optional_text(row, "id", where),
            prompt=self._source.shaped(prompt_at(row, columns["prompt"])),
            answer=answer_at(row, answer) if self._gold is None else self._gold(text_at(row, answer)),
            reward=self._optional_text(row, "reward", self._source.reward),
            task=self._optional_text(row, "task", self._task),
            where=where,
        )
        if record.reward != self._source.reward:
            try:
                self._check_reward(record.reward)
            except ValueError as error:
                raise BrokenRow(f"{columns['reward']!r}: {str(error).removeprefix('reward: ')}") from error
        first = self._first.setdefault(record.id, record)
        if first is record:
            return record
        if (first.prompt, first.answer) != (record.prompt, record.answer):
            raise BrokenRow(
                f"id {record.id!r} was used in {first.where} already, with another prompt or answer; make ids differ, or "
                "name another column in columns.id"
            )
        if self._source.duplicates == "error":
            raise BrokenRow(
                f"id {record.id!r} was used in {first.where} already; make ids differ, or set duplicates to 'drop'"
            )
        self.num_dropped += 1
        return None

    def _optional_text(self, row: Row, name: str, default: str) -> str:
        column = self._columns[name]
        try:
            value = value_at(row, column)
        except BrokenRow:
            return default
        self._found.add(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise BrokenRow(f"{column!r} must be text or a whole number, found {shown(value)}")
        return checked_text(str(value), column)

    def missing_columns(self) -> list[str]:
        """A line for each optional column that the source names and that no row has."""
        problems = []
        for name, column in self._source.columns.named().items():
            if self._last and name in ("id", "reward", "task") and name not in self._found:
                try:
                    value_at(self._last, column)
                except BrokenRow as error:
                    problems.append(f"columns.{name}: {error}")
        return problems
