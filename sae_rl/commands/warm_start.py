"""``sae-rl warm-start``: supervised training, with its progress on the console."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae_rl.settings import ConfigError, Section, nearest
from sae_rl.sft import ModelShape, WarmStart, warm_start
from sae_rl.tasks.table import TASKS, make_task
from sae_rl.tasks.task import Task


class DemonstrationsConfig(Section):
    """What to imitate: a task's demonstrations or the responses in a file."""

    task: str
    knobs: dict[str, Any]
    file: str | None


class WarmStartConfig(Section):
    """``conf/warm_start.yaml``."""

    output_dir: Path
    demonstrations: DemonstrationsConfig
    base_model: str | None
    shape: ModelShape
    training: WarmStart


def source_of(config: DemonstrationsConfig) -> Task | str:
    """The task, or the path of the file.

    Raises:
        ConfigError: the task is unknown or its knobs are wrong.
    """
    if config.file is not None:
        return config.file
    if config.task not in TASKS:
        raise ConfigError([f"demonstrations.task = {config.task!r} is unknown, {nearest(config.task, TASKS)}"])
    try:
        return make_task(config.task, config.knobs)
    except ValueError as error:
        raise ConfigError([f"demonstrations.knobs: {error}"]) from error


def run_warm_start(config: WarmStartConfig) -> None:
    """Trains a model and saves it.

    Raises:
        ConfigError: the source, the base model or the output folder is wrong.
    """
    source = source_of(config.demonstrations)
    console = Console(file=sys.stdout)
    columns = (
        TextColumn("supervised steps"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=config.training.steps, loss=float("nan"))
        try:
            losses = warm_start(
                str(config.output_dir),
                source,
                config.base_model,
                config.training,
                config.shape,
                on_progress=lambda step, loss: progress.update(bar, completed=step, loss=loss),
            )
        except ValueError as error:
            raise ConfigError(str(error).splitlines()) from error
    console.print(f"{config.output_dir}: {len(losses)} steps, last loss {losses[-1]:.3f}")
