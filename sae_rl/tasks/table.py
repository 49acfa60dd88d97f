"""The procedural tasks by name. A new task is a class in a file of its own, and its line in `TASKS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_rl.settings import from_knobs
from sae_rl.tasks.countdown import Countdown
from sae_rl.tasks.level import Level
from sae_rl.tasks.task import Task

TASKS: dict[str, type[Task]] = {"countdown": Countdown, "level": Level}


def make_task(name: str, knobs: Mapping[str, Any]) -> Task:
    """The task with these knobs. Raises ValueError for an unknown knob, a wrong type or a wrong range."""
    return from_knobs(TASKS[name], name, knobs)
