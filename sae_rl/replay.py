"""Training on recorded rollouts without rollout engines: to repeat an update, or to train where nothing can sample."""

from __future__ import annotations

from pathlib import Path

from sae_rl.driver import finish, learn, restore
from sae_rl.records.rollouts import FOLDER, read_step, step_files
from sae_rl.rollouts.groups import StepSamples
from sae_rl.run import Run
from sae_rl.settings import ConfigError


def train_replay(run: Run) -> None:
    """Trains one step on each recorded step, in their order. It evaluates nothing and pre-trains no critic.

    Raises:
        RuntimeError: a worker failed; the last checkpoint stays usable.
        ValueError: a file cannot be read.
    """
    config = run.config
    assert config.replay is not None, "this loop is chosen only for a configuration with replay"
    files = recorded_files(config.replay, config.steps)
    run.records.note(f"replaying {config.steps} of the steps recorded in {config.replay}; nothing is evaluated")
    first_step = restore(run)
    run.records.note(run.clock.told("ready"))
    for step in range(first_step, config.steps):
        recorded_step, file = files[step]
        with run.clock.phase("generate"):
            rollouts, rewards, reasons = read_step(file)
        samples = StepSamples(rollouts, rewards, reasons, metrics={}, sampler=run.sampler.state())
        finish(run, step, samples, learn(run, recorded_step, samples), {})


def recorded_files(folder: Path, num_steps: int) -> list[tuple[int, Path]]:
    """(step, file) of the first ``num_steps`` recorded steps of the run in ``folder``.

    Raises:
        ConfigError: fewer steps are recorded there.
    """
    files = step_files(folder / FOLDER)
    if len(files) < num_steps:
        found = f"replay = {folder}: {len(files)} steps are recorded in {folder / FOLDER}, but steps = {num_steps}"
        raise ConfigError([f"{found}; lower steps, or record more of them (logger.rollouts_every_steps=1)"])
    return files[:num_steps]
