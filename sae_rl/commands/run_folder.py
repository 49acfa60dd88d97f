"""The folder of a run: its checkpoints, its configuration and its exported policy."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae_rl import checkpoint
from sae_rl.config.schema import Config, as_tree, flat
from sae_rl.critic.card import reads_alike
from sae_rl.records.records import Records
from sae_rl.settings import ConfigError
from sae_rl.whole_files import whole_file

CONFIG = "config.yaml"
CRITIC_MODEL = "learner.critic.model.path"
NEED_CONSENT = (
    *("algorithm.estimator.", "algorithm.segmenter.", "algorithm.value_source."),
    *("model.path", CRITIC_MODEL),
)


def check_output(config: Config) -> None:
    """Raises ConfigError if ``output_dir`` cannot be created or written to. It creates nothing."""
    folder = config.output_dir.absolute()
    try:
        with tempfile.TemporaryFile(dir=next(each for each in (folder, *folder.parents) if each.exists())):
            pass
    except OSError as error:
        raise ConfigError([f"output_dir = {config.output_dir}: cannot write there ({error.strerror})"]) from error


class Found(NamedTuple):
    """The checkpoint that a run resumes from."""

    folder: Path | None = None  # None: a new run
    damaged: tuple[str, ...] = ()  # names of newer checkpoints
    note: str | None = None  # for the user, of these


def find_checkpoint(config: Config, *, verify: bool = True) -> Found:
    """The newest intact checkpoint in ``output_dir``, or the newest one.

    Args:
        verify: all its files are read.

    Raises:
        ConfigError: there is one, but ``resume`` is false; or there are damaged ones alone.
    """
    root = config.output_dir / "checkpoints"
    if (newest := checkpoint.newest(root)) is None:
        return Found()
    found = f"output_dir = {config.output_dir} holds"
    if not config.resume:
        advice = "resume=true continues it, or choose another output_dir"
        raise ConfigError([f"{found} {newest.name} of another run; {advice}"])
    if not verify:
        return Found(newest)
    intact, damaged = checkpoint.newest_intact(root)
    listed = ", ".join(f"{name} ({what})" for name, what in damaged.items())
    if intact is None:
        raise ConfigError([f"{found} damaged checkpoints alone: {listed}; choose another output_dir"])
    note = f"resuming from {intact.name}, since newer checkpoints are damaged: {listed}" if damaged else None
    return Found(intact, tuple(damaged), note)


def require_consent(config: Config, newest: Path) -> None:
    """Refuses to continue a run with another estimator, segmenter or model, unless ``resume`` is force.

    Raises:
        ConfigError: the message names the keys that differ. Or the checkpoint lacks the critic that a new estimator needs,
            or its critic's outputs mean other values.
    """
    loss, tree = config.algorithm.value_loss, _tree_before(config)
    trained = tree["algorithm"]["value_loss"] if "algorithm" in tree else None
    if trained is not None and (newest / "critic").is_dir() and not reads_alike(trained, loss):
        found = (
            f"output_dir = {config.output_dir} holds {newest.name} of a critic with algorithm.value_loss = {trained}"
        )
        raise ConfigError([f"{found}, whose outputs {type(loss).__name__} reads otherwise; choose another output_dir"])
    critics = dict(tree.get("algorithm", {}).get("value_source", {})).get("num_critics", 1) if tree else 1
    if (newest / "critic").is_dir() and config.algorithm.needs_critic and critics != config.algorithm.num_critics:
        found = f"output_dir = {config.output_dir} holds {newest.name} with {critics} critics"
        raise ConfigError([f"{found}, but this run has {config.algorithm.num_critics}; choose another output_dir"])
    changes = ((key, change) for key, change in _changes(config).items() if key.startswith(NEED_CONSENT))
    # A key that the last start did not have belongs to another version of a class, or to a class whose name differs.
    changed = [f"{key}: {then!r} -> {now!r}" for key, (then, now) in changes if then is not None or key == CRITIC_MODEL]
    found = f"output_dir = {config.output_dir} holds {newest.name} of a run with other settings: {', '.join(changed)}"
    if changed and config.resume != "force":
        raise ConfigError([f"{found}; resume=force continues it with the new ones, or choose another output_dir"])
    if changed and config.algorithm.needs_critic and not (newest / "critic").is_dir():
        raise ConfigError([f"{found}; it has no critic, which this run needs: choose another output_dir"])


def read_checkpoint(folder: Path) -> checkpoint.DriverState:
    """The driver's part of a checkpoint. Raises ConfigError if it cannot be read."""
    try:
        return checkpoint.read_state(folder)
    except ValueError as error:
        raise ConfigError([f"{error}; remove that folder to resume from the one before it"]) from error


def is_finished(config: Config, newest: Path) -> bool:
    """Whether a run whose newest checkpoint this is has done all its steps."""
    return read_checkpoint(newest).step >= config.steps


def publish_policy(config: Config, newest: Path) -> None:
    """Copies the policy of a run's last checkpoint to ``output_dir/policy``, for transformers and vLLM."""
    target = config.output_dir / "policy"
    partial = target.with_name(".partial_policy")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(newest / "hf", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_config(config: Config, records: Records) -> None:
    """Writes ``config.yaml``; a note lists what a resumed run changes."""
    if changed := [f"{key}: {before!r} -> {now!r}" for key, (before, now) in _changes(config).items()]:
        records.note("changed since the last start: " + ", ".join(changed))
    with whole_file(config.output_dir / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(as_tree(config), sort_keys=False))


def _changes(config: Config) -> dict[str, tuple[Any, Any]]:
    """What differs from the run's last start: key -> its value then, None if there was none, and its value now."""
    if not (tree := _tree_before(config)):
        return {}
    before, now = flat(tree), flat(as_tree(config))
    return {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key]}


def _tree_before(config: Config) -> dict[str, Any]:
    """The configuration of the run's last start; empty: there was none."""
    file = config.output_dir / CONFIG
    try:
        return dict(yaml.safe_load(file.read_text()) or {}) if file.exists() else {}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        found = f"{file}: it cannot be read, so what changed since the last start is not known"
        raise ConfigError([f"{found}; restore it, or remove it to resume without that check"]) from error


def check_run(folder: Path) -> None:
    """Raises ConfigError unless a run wrote into the folder. The message lists the runs of a sweep's folder."""
    if (folder / CONFIG).is_file():
        return
    if not folder.is_dir():
        raise ConfigError([f"{folder}: there is no such folder"])
    # A swept group, such as algorithm/segmenter, makes a folder of its own.
    runs = [str(file.parent) for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}/config.yaml"))]
    found = (
        f"it holds the runs {', '.join(runs)}: name one of them" if runs else "no run wrote into it (no config.yaml)"
    )
    raise ConfigError([f"{folder}: {found}"])
