"""``sae-rl warm-start``: supervised training, with its progress on the console."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from sae_rl.names import nearest
from sae_rl.settings import ConfigError, Section
from sae_rl.sft import ModelShape, WarmStart, warm_start
from sae_rl.tasks.table import TASKS, make_task
from sae_rl.tasks.task import Task


class DemonstrationsConfig(Section):
    """The task whose demonstrations the model imitates."""

    task: str
    knobs: dict[str, Any]


class WarmStartConfig(Section):
    """``conf/warm_start.yaml``."""

    output_dir: Path
    demonstrations: DemonstrationsConfig
    shape: ModelShape
    training: WarmStart


def task_of(config: DemonstrationsConfig) -> Task:
    """The task. Raises ConfigError if it is unknown or its knobs are wrong."""
    if ":" not in config.task and config.task not in TASKS:
        raise ConfigError([f"demonstrations.task = {config.task!r} is unknown, {nearest(config.task, TASKS)}"])
    try:
        return make_task(config.task, config.knobs)
    except ValueError as error:
        raise ConfigError([f"demonstrations.knobs: {error}"]) from error


def run_warm_start(config: WarmStartConfig) -> None:
    """Trains a model and saves it. Raises ConfigError if the task or the output folder is wrong."""
    task, console = task_of(config.demonstrations), Console()
    bar = partial(track, description="supervised steps", console=console, disable=not console.is_terminal)
    try:
        losses = warm_start(config.output_dir, task, config.training, config.shape, bar)
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    console.print(f"{config.output_dir}: {len(losses)} steps, last loss {losses[-1]:.3f}")
