"""Recorded rollouts: ``rollouts/step_000012.parquet`` has a row per response, and lists with a value per token.

A file holds everything that a training step learns from, so that `read_step` restores it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor

from sae_rl.types import Prompt, Rollout, Scores, StepRecord, offsets_of
from sae_rl.whole_files import whole_file

FOLDER = "rollouts"
SCORES = ("old_logprobs", "values", "ref_logprobs", "entropies", "value_spread")  # fields of `Scores` for each token
OLD_NAMES = {"sampled": "action_mask", "task": "data_set", "text": "response"}  # columns of earlier recordings


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every ``step_000012.parquet`` in a folder, in order."""
    found = [(re.fullmatch(r"step_(\d+)\.parquet", file.name), file) for file in folder.glob("*.parquet")]
    return sorted((int(match[1]), file) for match, file in found if match)


def write_rollouts(run_dir: Path, record: StepRecord) -> Path:
    """Writes the responses of one step and returns the file."""
    rollouts, scores = record.rollouts, record.scores
    flat = {
        "policy_versions": torch.cat([r.policy_versions for r in rollouts]),
        "old_logprobs": scores.old_logprobs,
        "ref_logprobs": scores.ref_logprobs,
        "entropies": scores.entropies,
        "values": scores.values,  # None: the estimator needs no critic
        "critic_values": record.critic_values,
        "returns": record.monte_carlo_returns,
        "advantages": record.targets.advantages,
        "opens": record.opens,
    }
    columns = {
        "step": pa.array([record.step] * len(rollouts), pa.int32()),
        "prompt_token_ids": pa.array([list(r.prompt.token_ids) for r in rollouts], pa.list_(pa.int32())),
        "final_value": pa.array(
            [None] * len(rollouts) if scores.final_values is None else scores.final_values.tolist(), pa.float64()
        ),
    }
    columns |= response_columns(rollouts, record.rewards, record.reasons, flat)
    return write_table(run_dir / FOLDER / f"step_{record.step:06d}.parquet", columns)


def write_scored(
    file: Path, rollouts: Sequence[Rollout], rewards: Sequence[float], reasons: Sequence[str], scores: Scores
) -> Path:
    """Writes responses and what networks compute from them as a recording without a step, for `read_scored`."""
    flat = {name: getattr(scores, name) for name in SCORES}
    flat["policy_versions"] = torch.cat([r.policy_versions for r in rollouts])
    prompts = pa.array([list(r.prompt.token_ids) for r in rollouts], pa.list_(pa.int32()))
    return write_table(file, {"prompt_token_ids": prompts} | response_columns(rollouts, rewards, reasons, flat))


def read_scored(file: Path) -> tuple[list[Rollout], list[float], list[str], Scores]:
    """What `write_scored` wrote. Raises ValueError as `read_step`."""
    table = read_rollouts(file)
    columns = {name: table.column(name).combine_chunks() for name in SCORES}
    scores = {
        name: None if column.null_count else torch.from_numpy(column.flatten().to_numpy().copy())
        for name, column in columns.items()
    }
    return *read_step(file), Scores(**scores)  # type: ignore[arg-type]


def response_columns(
    rollouts: Sequence[Rollout], rewards: Sequence[float], reasons: Sequence[str], flat: Mapping[str, Tensor | None]
) -> dict[str, pa.Array]:
    """The columns of every recording of responses, and ``flat`` (N,) values of their tokens. docs/runs.md lists them."""
    offsets = offsets_of([r.token_ids.numel() for r in rollouts])
    tokens = {
        "token_ids": torch.cat([r.token_ids for r in rollouts]),
        "action_mask": torch.cat([r.dense_action_mask for r in rollouts]),
        "rollout_logprobs": torch.cat([r.rollout_logprobs for r in rollouts]),
    }
    return {
        "data_set": pa.array([r.prompt.task for r in rollouts]),
        "prompt_id": pa.array([r.prompt.id for r in rollouts]),
        "prompt": pa.array([r.prompt.text for r in rollouts]),
        "answer": pa.array([r.prompt.answer for r in rollouts]),
        "verifier": pa.array([r.prompt.reward for r in rollouts]),
        "sample": pa.array([r.sample for r in rollouts], pa.int32()),
        "response": pa.array([r.text for r in rollouts]),
        "reward": pa.array(rewards, pa.float64()),
        "why": pa.array(reasons, pa.string()),
        "finish_reason": pa.array([r.finish_reason for r in rollouts]),
        "num_tokens": pa.array([r.token_ids.numel() for r in rollouts], pa.int32()),
        "temperature": pa.array([r.temperature for r in rollouts], pa.float32()),
        **{name: ragged(values, offsets) for name, values in (tokens | {**flat}).items()},
    }


def write_table(file: Path, columns: Mapping[str, pa.Array]) -> Path:
    """Writes a parquet file, and its folder if needed. A killed process leaves no partial file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table, floats = pa.table(dict(columns)), [name for name, column in columns.items() if _holds_floats(column.type)]
    with whole_file(file) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            # The bytes of floats of equal significance lie together, which compresses to two thirds; a dictionary only adds.
            use_byte_stream_split=[f"{name}.list.element" for name in floats],
            use_dictionary=[path for path in _paths(table) if path.partition(".")[0] not in floats],
        )
    return file


def _holds_floats(kind: pa.DataType) -> bool:
    """Whether a column has a list of floats in each row: a number for every token."""
    return bool(pa.types.is_large_list(kind) and pa.types.is_floating(kind.value_type))


def _paths(table: pa.Table) -> list[str]:
    """The columns as parquet names them."""
    return [f"{f.name}.list.element" if pa.types.is_nested(f.type) else f.name for f in table.schema]


def read_rollouts(file: Path) -> pa.Table:
    """The rows of one recorded step."""
    table = pq.read_table(file)
    return table.rename_columns([OLD_NAMES.get(name, name) for name in table.column_names])


def check_step(file: Path) -> None:
    """Raises ValueError for a file that was cut, or that is no recording. It reads no rows."""
    try:
        found = {OLD_NAMES.get(name, name) for name in pq.read_schema(file).names}
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} holds no rollouts that can be read: {error}") from error
    if lacking := {"token_ids", "rollout_logprobs", "reward", "action_mask"} - found:
        raise ValueError(f"{file} holds no rollouts: it lacks the columns {', '.join(sorted(lacking))}")


def read_step(file: Path) -> tuple[list[Rollout], list[float], list[str]]:
    """The responses of a recorded step, their rewards, and the verifier's reasons. Raises ValueError for any other file."""
    try:
        rows = read_rollouts(file).to_pylist()
        return [_rollout(row) for row in rows], [row["reward"] for row in rows], [row["why"] for row in rows]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"{file} holds no rollouts that can be read: {error!r}") from error


def _rollout(row: dict[str, Any]) -> Rollout:
    action_mask = torch.tensor(row["action_mask"])
    return Rollout(
        prompt=Prompt(
            id=row["prompt_id"],
            text=row["prompt"],
            token_ids=tuple(row["prompt_token_ids"]),
            answer=row["answer"],
            task=row["data_set"],
            reward=row["verifier"],
        ),
        sample=row["sample"],
        token_ids=torch.tensor(row["token_ids"], dtype=torch.int32),
        rollout_logprobs=torch.tensor(row["rollout_logprobs"], dtype=torch.float32),
        text=row["response"],
        finish_reason=row["finish_reason"],
        policy_versions=torch.tensor(row["policy_versions"], dtype=torch.int32),
        temperature=row["temperature"],
        action_mask=None if bool(action_mask.all()) else action_mask,
    )


def ragged(values: Tensor | None, offsets: Tensor) -> pa.Array:
    """Flat (N,) and offsets (B+1,) -> B lists of booleans or 32-bit numbers; offsets have 64 bits, as N may exceed 2^31."""
    if values is None:
        return pa.nulls(offsets.numel() - 1, pa.large_list(pa.float32()))
    assert values.shape == (int(offsets[-1]),), f"{tuple(values.shape)} values for {int(offsets[-1])} tokens"
    if values.dtype != torch.bool:
        values = values.float() if values.is_floating_point() else values.int()
    return pa.LargeListArray.from_arrays(offsets.numpy(), values.detach().cpu().numpy())
