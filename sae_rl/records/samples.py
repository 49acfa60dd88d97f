"""Recorded samples of evaluations: parquet files with a row per sample.

During training, ``evaluation/step_000020.parquet`` holds the samples of the policy after 20 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor

from sae_rl.records.rollouts import response_columns, step_files, write_table
from sae_rl.rewards.pool import Rewards
from sae_rl.rewards.verdict import Failed
from sae_rl.types import Rollout

FOLDER = "evaluation"


def samples_file(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}.parquet"


def step_samples(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of every recorded evaluation of a run, in order."""
    return step_files(run_dir / FOLDER)


def write_samples(file: Path, rollouts: Sequence[Rollout], rewards: Rewards, opens: Sequence[Tensor] | None) -> Path:
    """Writes the samples of one evaluation.

    Args:
        opens: (T,) for each response; None: unknown, and null in the file.
    """
    flat = {
        "logprobs": torch.cat([r.rollout_logprobs for r in rollouts]),
        "opens": None if opens is None else torch.cat(list(opens)),
    }
    columns = {
        "data_set": pa.array([r.prompt.task for r in rollouts]),
        "response": pa.array([r.text for r in rollouts]),
        "score": pa.array(rewards.scores, pa.float64()),
        "why": pa.array(rewards.reasons, pa.string()),
        "extracted_answer": pa.array(rewards.answers, pa.string()),
        "failed": pa.array([isinstance(outcome, Failed) for outcome in rewards.outcomes]),
        "num_tokens": pa.array([r.token_ids.numel() for r in rollouts], pa.int32()),
    }
    return write_table(file, columns | response_columns(rollouts, flat))


def read_samples(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one file, with all columns or only ``columns``. Raises ValueError if the file holds no samples."""
    try:
        return pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} holds no samples that can be read: {error!r}") from error
