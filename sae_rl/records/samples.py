"""Recorded samples of evaluations: parquet files with a row per sample.

During training, ``evaluation/step_000020.parquet`` holds the samples of the policy after 20 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from torch import Tensor

from sae_rl.records.rollouts import response_columns, write_table
from sae_rl.rewards.pool import Rewards
from sae_rl.rewards.verdict import Failed
from sae_rl.types import Rollout

FOLDER = "evaluation"


def write_samples(file: Path, rollouts: Sequence[Rollout], rewards: Rewards, opens: Sequence[Tensor] | None) -> Path:
    """Writes the samples of one evaluation.

    Args:
        opens: (T,) for each response; None: unknown, and null in the file.
    """
    flat = {"opens": None if opens is None else torch.cat(list(opens))}
    columns = {
        "extracted_answer": pa.array(rewards.answers, pa.string()),
        "failed": pa.array([isinstance(outcome, Failed) for outcome in rewards.outcomes]),
    }
    return write_table(file, response_columns(rollouts, rewards.scores, rewards.reasons, flat) | columns)
