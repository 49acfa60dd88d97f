"""The procedural tasks by name. To add one, write a class like `Level` or `Countdown` and put it in `TASKS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sae_rl.settings import describe
from sae_rl.tasks.countdown import Countdown
from sae_rl.tasks.level import Level
from sae_rl.tasks.task import Task

TASKS: dict[str, type[Any]] = {"countdown": Countdown, "level": Level}


def knobs_of(name: str) -> list[str]:
    """The names of a task's knobs."""
    return [field.name for field in dataclasses.fields(TASKS[name])]  # type: ignore[arg-type]


def make_task(name: str, knobs: Mapping[str, Any]) -> Task:
    """The task with these knobs of its own. Raises ValueError if it refuses one, or if one is of the wrong type."""
    assert knobs.keys() <= set(knobs_of(name)), "pydantic would ignore what it does not know"
    try:
        task: Task = TypeAdapter(TASKS[name]).validate_python(dict(knobs))
    except ValidationError as error:
        raise ValueError("; ".join(describe(error))) from None
    return task
