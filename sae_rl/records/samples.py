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

from sae_rl.records.rollouts import ragged, step_files, write_table
from sae_rl.rewards.pool import Rewards
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.types import Rollout, offsets_of

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
    offsets = offsets_of([r.token_ids.numel() for r in rollouts])
    outcomes = rewards.outcomes
    split = None if opens is None else torch.cat(list(opens))
    columns = {
        "data_set": pa.array([r.prompt.task for r in rollouts]),
        "prompt_id": pa.array([r.prompt.id for r in rollouts]),
        "prompt": pa.array([r.prompt.text for r in rollouts]),
        "answer": pa.array([r.prompt.answer for r in rollouts]),
        "verifier": pa.array([r.prompt.reward for r in rollouts]),
        "sample": pa.array([r.sample for r in rollouts], pa.int32()),
        "response": pa.array([r.text for r in rollouts]),
        "score": pa.array(rewards.scores, pa.float64()),
        "why": pa.array(rewards.reasons, pa.string()),
        "extracted_answer": pa.array(
            [outcome.answer if isinstance(outcome, Verdict) else None for outcome in outcomes], pa.string()
        ),
        "failed": pa.array([isinstance(outcome, Failed) for outcome in outcomes]),
        "finish_reason": pa.array([r.finish_reason for r in rollouts]),
        "num_tokens": pa.array([r.token_ids.numel() for r in rollouts], pa.int32()),
        "temperature": pa.array([r.temperature for r in rollouts], pa.float32()),
        "token_ids": ragged(torch.cat([r.token_ids for r in rollouts]).int(), offsets),
        "logprobs": ragged(torch.cat([r.rollout_logprobs for r in rollouts]).float(), offsets),
        "action_mask": ragged(torch.cat([r.dense_action_mask for r in rollouts]), offsets),
        # a soft segmenter gives weights
        "opens": ragged(split if split is None or split.dtype == torch.bool else split.float(), offsets),
    }
    return write_table(file, columns)


def read_samples(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one file, with all ``columns`` or some.

    Raises:
        ValueError: the file holds no samples.
    """
    try:
        return pq.read_table(file, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} holds no samples that can be read: {error!r}") from error
