"""Learning from recorded rollouts, without any engine: to look at an update again, or on a machine that cannot sample."""

from __future__ import annotations

from pathlib import Path

from sae_rl.driver import Run, finish, learn, restore
from sae_rl.records.rollouts import FOLDER, read_step, rollout_files
from sae_rl.rollouts.groups import StepSamples
from sae_rl.settings import ConfigError


def train_replay(run: Run) -> None:
    """One step for each recorded one, in their order; nothing is evaluated, and the critic is not pre-trained.

    Raises:
        RuntimeError: a worker failed; the last checkpoint stays usable.
        ValueError: a file cannot be read.
    """
    files = recorded_files(run.config.replay, run.config.steps)
    run.records.note(f"replaying {run.config.steps} of the steps recorded in {run.config.replay}; nothing is evaluated")
    first = restore(run)
    run.clock.lap()
    for step in range(first, run.config.steps):
        recorded_step, file = files[step]
        with run.clock.phase("generate"):
            rollouts, rewards, reasons = read_step(file)
        samples = StepSamples(rollouts, rewards, reasons, {}, run.sampler.state())
        finish(run, step, samples, learn(run, recorded_step, samples), {})


def recorded_files(folder: Path | None, num_steps: int) -> list[tuple[int, Path]]:
    """(step, file) of the first ``num_steps`` recorded steps of a run.

    Raises:
        ConfigError: there are not so many.
    """
    assert folder is not None, "asked only when the configuration has a replay"
    files = rollout_files(folder)
    if len(files) < num_steps:
        raise ConfigError(
            [
                f"replay = {folder}: {len(files)} steps are recorded in {folder / FOLDER}, but steps = {num_steps}; lower "
                "steps, or record more of them (logger.rollouts_every_steps=1)"
            ]
        )
    return files[:num_steps]
