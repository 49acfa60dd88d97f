"""The procedural tasks by name. A new task is a class in a file of its own, and its line in `TASKS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sae_rl.settings import describe, nearest
from sae_rl.tasks.countdown import Countdown
from sae_rl.tasks.level import Level
from sae_rl.tasks.task import Task

TASKS: dict[str, type[Any]] = {"countdown": Countdown, "level": Level}


def knobs_of(name: str) -> list[str]:
    """The knobs of a task: the fields of its dataclass."""
    return [field.name for field in dataclasses.fields(TASKS[name])]  # type: ignore[arg-type]


def make_task(name: str, knobs: Mapping[str, Any]) -> Task:
    """The task with these knobs. Raises ValueError for an unknown knob, a wrong type or a wrong range."""
    for unknown in knobs.keys() - set(knobs_of(name)):  # pydantic would ignore them
        raise ValueError(f"{name} has no knob {unknown!r}, {nearest(unknown, knobs_of(name))}")
    try:
        task: Task = TypeAdapter(TASKS[name]).validate_python(dict(knobs))
    except ValidationError as error:
        raise ValueError("; ".join(describe(error))) from None
    return task
