"""The folder of a run: its checkpoints, its configuration and its exported policy."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import yaml

from sae_rl import checkpoint
from sae_rl.config.schema import Config, as_tree
from sae_rl.config.schema import flat as _flat
from sae_rl.records.records import Records
from sae_rl.settings import ConfigError


def prepare_output(config: Config) -> None:
    """Creates ``output_dir``. Raises ConfigError if it cannot be created or written to."""
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=config.output_dir):
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


def is_finished(config: Config, newest: Path) -> bool:
    """Whether a run whose newest checkpoint this is has done all its steps."""
    return checkpoint.read_state(newest).step >= config.steps


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


def check_run(folder: Path) -> None:
    """Raises ConfigError unless a run wrote into the folder. The message lists the runs of a sweep's folder."""
    if (folder / "config.yaml").is_file():
        return
    if not folder.is_dir():
        raise ConfigError([f"{folder}: there is no such folder"])
    # A swept group, such as algorithm/segmenter, makes a folder of its own.
    runs = [str(file.parent) for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}/config.yaml"))]
    found = (
        f"it holds the runs {', '.join(runs)}: name one of them" if runs else "no run wrote into it (no config.yaml)"
    )
    raise ConfigError([f"{folder}: {found}"])
