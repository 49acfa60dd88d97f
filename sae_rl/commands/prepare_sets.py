"""``sae-rl prepare-sets``: published sets of problems, each checked and written as one file that ``task=math_sets`` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from operator import eq
from pathlib import Path
from typing import Literal

from sae_rl.data.prompts import Record
from sae_rl.data.rows import listed
from sae_rl.data.sources.file import FileSource
from sae_rl.rewards.table import check_answer, resolve
from sae_rl.settings import ConfigError, Positive, Section
from sae_rl.whole_files import whole_file


class PublishedSet(FileSource):
    """Where a set of problems is published, how to read its rows, and how many problems it has."""

    name: Literal["file"] = "file"
    reward: str = "math"  # what must be able to read the answers
    num_problems: Positive  # as published; another number is an error. Of them, num_prompts are written, or all
    before: str = ""  # instruction in front of a problem, which is left out
    after: str = ""  # instruction behind a problem, which is left out


class PrepareConfig(Section):
    """``conf/prepare_sets.yaml``."""

    output_dir: Path
    sets: dict[str, PublishedSet | None]  # null: this set is not prepared


def run_preparation(config: PrepareConfig) -> None:
    """Writes ``output_dir/NAME.jsonl`` for every set: prompt, answer and id, and what a row says of reward and task.

    Raises:
        ConfigError: everything that is wrong with the sets. Those with nothing wrong are written.
    """
    problems = []
    for name, source in config.sets.items():
        if source is None:
            continue
        try:
            records = _records(source)
        except ValueError as error:
            problems += [f"sets.{name}: {line}" for line in str(error).splitlines()]
            continue
        bare = [_bare(record, source) for record in records[: source.num_prompts]]
        file = config.output_dir / f"{name}.jsonl"
        _write(file, bare, source)
        print(f"{file}: {len(bare):,} problem{'s' * (len(bare) != 1)}")
        if source.before and (same := sum(map(eq, records, bare))):
            print(f"  {same:,} of them came without the instruction around them, and are as published")
    if problems:
        raise ConfigError(problems)


def _records(source: PublishedSet) -> list[Record]:
    """The problems of a set. Raises ValueError if a row or an answer cannot be read, or if it has another number of them."""
    verifier = cache(lambda name: resolve(name, {}))
    records, problems = source.records(verifier, None)
    unreadable = []
    for record in records:
        try:
            check_answer(verifier(record.reward), record.answer, is_json=record.is_json)
        except ValueError as error:
            unreadable.append(f"{record.where}: {error}")
    problems += listed(f"the reward cannot read {len(unreadable)} of {len(records)} answers", unreadable)
    if not problems and len(records) != source.num_problems:
        problems = [
            f"num_problems = {source.num_problems}, but {', '.join(source.paths)} has {len(records)}; choose the published "
            "file, or set num_problems if another one is meant"
        ]
    if problems:
        raise ValueError("\n".join(problems))
    return records


def _bare(record: Record, source: PublishedSet) -> Record:
    """The record without the instructions around its problem."""
    if not isinstance(record.prompt, str):
        return record
    return replace(record, prompt=record.prompt.removeprefix(source.before).removesuffix(source.after))


def _write(file: Path, records: Sequence[Record], source: PublishedSet) -> None:
    """Writes prompt, answer and id of each record, and the reward and the task that its own row names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    defaults = {source.reward, *(Path(path).stem for path in source.paths)}
    rows = (
        {"prompt": record.prompt, "answer": record.answer, "id": record.id}
        | {key: own for key in ("reward", "task") if (own := getattr(record, key)) not in defaults}
        for record in records
    )
    with whole_file(file) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
