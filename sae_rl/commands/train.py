"""``sae-rl train``: a training run from prompts to the exported policy."""

from __future__ import annotations

from collections.abc import Callable

from sae_rl.commands.assemble import assembled
from sae_rl.commands.report import leave_report
from sae_rl.commands.run_folder import find_checkpoint, is_finished, prepare_output, publish_policy, require_consent
from sae_rl.config.schema import Config
from sae_rl.critic import card
from sae_rl.driver import train
from sae_rl.overlapped import train_overlapped
from sae_rl.records.terminal import console
from sae_rl.replay import recorded_files, train_replay
from sae_rl.run import Run
from sae_rl.settings import ConfigError
from sae_rl.workers.session import Session
from sae_rl.workers.table import roles_of


def run_training(config: Config, session: Session | None = None) -> None:
    """Trains a policy and exports it to ``output_dir/policy``. However the run ends, it leaves ``report.html``.

    Args:
        session: of several runs that follow each other; None: this run has a connection to Ray of its own.

    Raises:
        ConfigError: data, folders or Ray's resources do not fit the configuration; no worker was started. Or the run in
            ``output_dir`` is finished.
        WorkerError, RuntimeError: the run failed; its last checkpoint is usable.
    """
    if config.replay is not None:
        recorded_files(config.replay, config.steps)
    prepare_output(config)
    resume_from = find_checkpoint(config)
    if resume_from is not None and is_finished(config, resume_from):
        publish_policy(config)  # the finished run may have been killed before it published
        done = f"{resume_from} has done all of steps = {config.steps}: nothing is left to train"
        raise ConfigError([f"{done}; raise steps, or choose another output_dir"])
    if resume_from is not None:
        require_consent(config, resume_from)
    notes = []
    if config.algorithm.needs_critic and config.learner.critic_pretraining.checkpoint is not None:
        notes.append(card.describe(config))
    if config.evaluation.every_steps == 0 and config.replay is None:
        notes.append("nothing is evaluated: evaluation.every_steps = 0")
    mode = config.logger.console
    output = console(plain=mode != "rich", quiet=mode == "off")
    try:
        with assembled(config, roles_of(config), resume_from, session) as run:
            for text in notes:
                run.records.note(text)
            loop_of(config)(run)
        publish_policy(config)
    except ConfigError:
        raise  # nothing was trained
    except BaseException:  # also Ctrl-C
        output.print(leave_report(config.output_dir), markup=False)
        raise
    output.print(leave_report(config.output_dir), markup=False)


def loop_of(config: Config) -> Callable[[Run], None]:
    """The loop that a configuration chooses."""
    if config.replay is not None:
        return train_replay
    return {"synchronous": train, "overlapped": train_overlapped}[config.schedule.mode]
