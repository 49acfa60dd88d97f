"""The page about runs lists the columns that recordings have."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from sae_rl.records.rollouts import write_rollouts
from sae_rl.records.samples import write_samples
from tests.evaluation.made_up import made_up, make_config
from tests.records.sample_run import step_record

PAGE = Path(__file__).parents[2] / "docs" / "runs.md"


def kind_of(column: pa.DataType) -> str:
    return f"list of {column.value_type}" if pa.types.is_nested(column) else str(column)


def test_the_columns_of_both_files_are_those_of_the_page(tmp_path: Path) -> None:
    result = made_up(make_config(tmp_path))
    written = {
        "rollouts": write_rollouts(tmp_path, step_record(0, num_prompts=1, skill=0.5, rng=random.Random(0))),
        "samples": write_samples(tmp_path / "samples.parquet", result.rollouts, result.rewards, result.opens),
    }
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (yes|-) \| (yes|-) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    page = {
        "rollouts": [(name, kind) for name, kind, is_there, _, _ in rows if is_there == "yes"],
        "samples": [(name, kind) for name, kind, _, is_there, _ in rows if is_there == "yes"],
    }
    for which, file in written.items():
        schema = pq.read_schema(file)
        assert page[which] == [(field.name, kind_of(field.type)) for field in schema], which
