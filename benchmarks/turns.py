"""Programs that take turns, so that what the machine does beside them meets all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping


def take_turns(
    programs: Mapping[str, Callable[[], object]], rounds: int, slow_s: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of every run that counts: not the first, which compiles and warms up.

    A program that takes longer than ``slow_s`` runs once, and that run counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, program in programs.items():
            if turn and seconds[name] and seconds[name][0] > slow_s:
                continue
            started = time.perf_counter()
            program()
            elapsed = time.perf_counter() - started
            if turn or elapsed > slow_s:
                seconds[name].append(elapsed)
    return seconds
