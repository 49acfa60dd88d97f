"""The files of rollouts that an earlier run recorded."""

from __future__ import annotations

from pathlib import Path

from sae_rl.records.rollouts import FOLDER, rollout_files
from sae_rl.settings import ConfigError


def recorded_files(folder: Path, num_steps: int) -> list[tuple[int, Path]]:
    """(step, file) of the first ``num_steps`` recorded steps of the run in ``folder``.

    Raises:
        ConfigError: fewer steps are recorded there.
    """
    files = rollout_files(folder)
    if len(files) < num_steps:
        raise ConfigError(
            [
                f"replay = {folder}: {len(files)} steps are recorded in {folder / FOLDER}, but steps = {num_steps}; lower "
                "steps, or record more of them (logger.rollouts_every_steps=1)"
            ]
        )
    return files[:num_steps]
