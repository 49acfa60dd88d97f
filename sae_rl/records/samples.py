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
