"""``sae-rl warm-start``: the configuration of supervised training, and its progress on the console."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae_rl.config import ConfigError, Section, nearest
from sae_rl.data.prompts import TASKS
from sae_rl.warm_start import ModelShape, WarmStart, warm_start


class WarmStartConfig(Section):
    """``conf/warm_start.yaml``."""

    output_dir: Path
    task: str
    data: str | None
    base_model: str | None
    knobs: dict[str, Any]
    shape: ModelShape
    training: WarmStart


def run_warm_start(config: WarmStartConfig) -> None:
    """Trains and saves; says how far it is.

    Raises:
        ConfigError: the source, the base model or the output folder does not fit.
    """
    try:
        source = config.data or TASKS[config.task](**config.knobs)
    except KeyError:
        raise ConfigError([f"task = {config.task!r} is unknown, {nearest(config.task, list(TASKS))}"]) from None
    except (TypeError, ValueError) as error:
        raise ConfigError([f"knobs = {config.knobs}: {error}"]) from error
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
