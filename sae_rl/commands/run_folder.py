"""The folder of a run: its checkpoints, its configuration and its exported policy."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from sae_rl import checkpoint
from sae_rl.config.schema import Config, as_tree
from sae_rl.records.records import Records
from sae_rl.settings import ConfigError


def check_output(config: Config) -> None:
    """Raises ConfigError if ``output_dir`` cannot be created or written to. It creates nothing."""
    folder = config.output_dir.absolute()
    try:
        with tempfile.TemporaryFile(dir=next(each for each in (folder, *folder.parents) if each.exists())):
            pass
    except OSError as error:
        raise ConfigError([f"output_dir = {config.output_dir}: cannot write there ({error.strerror})"]) from error


def find_checkpoint(config: Config) -> Path | None:
    """The newest checkpoint in ``output_dir``; None: there is none.

    Raises:
        ConfigError: there is one, but ``resume`` is false.
    """
    newest = checkpoint.newest(config.output_dir / "checkpoints")
    if newest is None:
        return None
    if not config.resume:
        found = f"output_dir = {config.output_dir} holds {newest.name} of another run"
        raise ConfigError([f"{found}; resume=true continues it, or choose another output_dir"])
    return newest


def read_checkpoint(folder: Path) -> checkpoint.DriverState:
    """The driver's part of a checkpoint. Raises ConfigError if it cannot be read."""
    try:
        return checkpoint.read_state(folder)
    except ValueError as error:
        raise ConfigError([f"{error}; remove that folder to resume from the one before it"]) from error


def is_finished(config: Config, newest: Path) -> bool:
    """Whether a run whose newest checkpoint this is has done all its steps."""
    return read_checkpoint(newest).step >= config.steps


def publish_policy(config: Config) -> None:
    """Copies the policy of the newest checkpoint to ``output_dir/policy``, for transformers and vLLM."""
    newest, target = checkpoint.newest(config.output_dir / "checkpoints"), config.output_dir / "policy"
    assert newest is not None, "a run ends with a checkpoint"
    partial = target.with_name(".partial_policy")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(newest / "hf", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_config(config: Config, records: Records) -> None:
    """Writes ``config.yaml``; a note lists what a resumed run changes."""
    file = config.output_dir / "config.yaml"
    tree = as_tree(config)
    if file.exists():
        before, now = _flat(yaml.safe_load(file.read_text())), _flat(tree)
        changed = [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in now if before.get(key) != now.get(key)]
        if changed:
            records.note("changed since the last start: " + ", ".join(changed))
    file.write_text(yaml.safe_dump(tree, sort_keys=False))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
