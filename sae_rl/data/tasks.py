"""The procedural tasks by name. To add one, write a class like `Level` or `Countdown` and put it in `TASKS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sae_rl.data.countdown import Countdown
from sae_rl.data.level import Level
from sae_rl.data.task import Task

TASKS: dict[str, Callable[..., Task]] = {"countdown": Countdown, "level": Level}


def knobs_of(name: str) -> list[str]:
    """The names of a task's knobs."""
    return [field.name for field in dataclasses.fields(TASKS[name])]  # type: ignore[arg-type]


def make_task(name: str, knobs: Mapping[str, Any]) -> Task:
    """The task with these knobs. Raises ValueError if it refuses one."""
    try:
        return TASKS[name](**knobs)
    except TypeError as error:
        raise ValueError(f"knobs = {dict(knobs)}: {error}") from error
