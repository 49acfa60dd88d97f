"""The folder of a run: made and probed, its checkpoint found, its configuration and its policy written."""

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


def prepare_output(config: Config) -> None:
    """Raises ConfigError unless the output folder can be made and written to."""
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=config.output_dir):
            pass
    except OSError as error:
        raise ConfigError([f"output_dir = {config.output_dir}: cannot write there ({error.strerror})"]) from error


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        ConfigError: it has done all steps already, or a new run would mix with an old one.
    """
    newest = checkpoint.newest(config.output_dir / "checkpoints")
    if newest is None:
        return None
    if not config.resume:
        raise ConfigError(
            [
                f"output_dir = {config.output_dir} holds {newest.name} of another run; resume=true continues it, or choose "
                "another output_dir"
            ]
        )
    done = checkpoint.read_state(newest).step
    if done >= config.steps:
        publish_policy(config)  # a kill may have come between the last checkpoint and this
        raise ConfigError(
            [
                f"{newest} has done {done} steps and steps = {config.steps}: nothing is left to train; raise steps, or "
                "choose another output_dir"
            ]
        )
    return newest


def publish_policy(config: Config) -> None:
    """``output_dir/policy``: the policy of the newest checkpoint, for transformers and vLLM."""
    newest, target = checkpoint.newest(config.output_dir / "checkpoints"), config.output_dir / "policy"
    assert newest is not None, "a run ends with a checkpoint"
    partial = target.with_name(".partial_policy")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(newest / "hf", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_config(config: Config, records: Records) -> None:
    """``config.yaml`` of the run; says what a resumed run changes."""
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
