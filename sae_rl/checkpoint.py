"""Checkpoints hold everything that decides the next step. A crash at any moment leaves the last one usable.

A checkpoint is a folder ``step_000040``: ``driver.json`` (step, sampler), ``policy/`` and ``critic/`` (DeepSpeed: weights,
optimizer, schedule, random states) and ``hf/`` (the policy for transformers and vLLM). It is written under another name
and renamed when it is complete. Seeds of sampling and of mini-batches derive from the run's seed and the step, so they
are not saved.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from sae_rl.data.sampler import SamplerState
from sae_rl.protocols import Workers

PREFIX = "step_"


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """The driver's part of a checkpoint."""

    step: int  # number of steps done
    sampler: SamplerState


def save(root: Path, state: DriverState, workers: Workers, keep_last: int) -> Path:
    """Writes one checkpoint and removes all but the newest ``keep_last``."""
    target = root / f"{PREFIX}{state.step:06d}"
    partial = root / f".partial_{target.name}"
    for leftover in root.glob(".partial_*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    workers.save(partial)
    (partial / "driver.json").write_text(json.dumps(asdict(state)))
    _sync_to_disk(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync_to_disk(root)
    for old in _complete(root)[:-keep_last]:
        shutil.rmtree(old)
    return target


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint; None: there is none."""
    complete = _complete(root)
    return complete[-1] if complete else None


def read_state(folder: Path) -> DriverState:
    """The driver's part of a checkpoint.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    file = folder / "driver.json"
    try:
        return DriverState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no checkpoint: {file} cannot be read ({error})") from error


def _complete(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob(f"{PREFIX}*") if folder.is_dir())


def _sync_to_disk(folder: Path) -> None:
    """Flushes a folder to the disk, so that its rename cannot get there first."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
