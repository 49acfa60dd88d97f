"""``sae-rl train``: a training run from prompts to the exported policy."""

from __future__ import annotations

from collections.abc import Callable

from sae_rl import checkpoint
from sae_rl.commands.assemble import assembled
from sae_rl.commands.preflight import Ready, check_critic, prepared, show_outline
from sae_rl.commands.report import leave_report
from sae_rl.commands.run_folder import Found, find_checkpoint, is_finished, publish_policy, require_consent
from sae_rl.config.schema import Config
from sae_rl.driver import train
from sae_rl.overlapped import train_overlapped
from sae_rl.records.rollouts import check_step
from sae_rl.records.terminal import console
from sae_rl.replay import recorded_files, train_replay
from sae_rl.run import Run
from sae_rl.run_lock import check_unlocked, locked
from sae_rl.settings import ConfigError
from sae_rl.workers.session import Session
from sae_rl.workers.table import roles_of


def run_training(config: Config, session: Session | None = None) -> None:
    """Trains a policy and exports it to ``output_dir/policy``. However the run ends, it leaves ``report.html``.

    With ``dry_run`` it only checks, and says what would run.

    Args:
        session: of several runs that follow each other; None: this run has a connection to Ray of its own.

    Raises:
        ConfigError: data, folders or Ray's resources do not fit the configuration; no worker was started. Or the run in
            ``output_dir`` is finished.
        WorkerError, RuntimeError: the run failed; its last checkpoint is usable.
    """
    check_unlocked(config.output_dir)  # before files are read that another run may be removing
    found, root = find_checkpoint(config), config.output_dir / "checkpoints"
    newest = checkpoint.newest(root)
    if found.folder is not None and is_finished(config, found.folder) and not config.dry_run:
        publish_policy(config, found.folder)  # the finished run may have been killed before it published
    ready = prepare_training(config, found)
    if config.dry_run:
        return show_outline(ready)
    mode = config.logger.console
    output = console(plain=mode != "rich", quiet=mode == "off")
    try:
        with locked(config.output_dir):
            if checkpoint.newest(root) != newest:
                raise ConfigError([f"output_dir = {config.output_dir}: another run wrote there meanwhile; start again"])
            checkpoint.set_aside(root, found.damaged)
            with assembled(ready, session) as run:
                loop_of(config)(run)
            newest = checkpoint.newest(root)
            assert newest is not None, "a run ends with a checkpoint"
            publish_policy(config, newest)
    except ConfigError:
        raise  # nothing was trained
    except BaseException:  # also Ctrl-C
        output.print(leave_report(config.output_dir), markup=False)
        raise
    output.print(leave_report(config.output_dir), markup=False)


def prepare_training(config: Config, found: Found) -> Ready:
    """Checks everything that a training run needs. Nothing is started or written. Raises ConfigError as `run_training`."""
    resume_from = found.folder
    if resume_from is not None and is_finished(config, resume_from):
        done = f"{resume_from} has done all of steps = {config.steps}: nothing is left to train"
        raise ConfigError([f"{done}; raise steps, or choose another output_dir"])
    if resume_from is not None:
        require_consent(config, resume_from)

    def replay() -> None:
        if config.replay is not None:
            for _, file in recorded_files(config.replay, config.steps):
                try:
                    check_step(file)
                except ValueError as error:
                    raise ConfigError([f"replay = {config.replay}: {error}"]) from error

    def evaluation() -> str | None:
        is_off = config.evaluation.every_steps == 0 and config.replay is None
        return "nothing is evaluated: evaluation.every_steps = 0" if is_off else None

    return prepared(
        config,
        roles_of(config),
        resume_from=resume_from,
        more=(replay, lambda: check_critic(config), evaluation, lambda: found.note),
    )


def loop_of(config: Config) -> Callable[[Run], None]:
    """The loop that a configuration chooses."""
    if config.replay is not None:
        return train_replay
    return {"synchronous": train, "overlapped": train_overlapped}[config.schedule.mode]
