"""The wall time of each phase of a step, measured on the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the phases of a step.

    Phases do not overlap. A phase inside another one counts for the outer one, so that sampling for an evaluation is
    `evaluate` and not `generate`.

        clock = Clock()
        with clock.phase("generate"):
            ...
        clock.lap()  # {"time/generate_s": 4.1, "time/step_s": 4.3, "time/driver_s": 0.2}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._open: list[str] = []
        self._totals: dict[str, float] = {}
        self._started = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the phase's total, even if it ends in an exception."""
        self._open.append(name)
        started = self._now()
        try:
            yield
        finally:
            self._open.pop()
            if not self._open:
                self._totals[name] = self._totals.get(name, 0.0) + self._now() - started

    def so_far(self) -> dict[str, float]:
        """The times that `lap` would return now, without ending the lap."""
        totals, step_s = dict(self._totals), self._now() - self._started
        return {f"time/{name}_s": seconds for name, seconds in totals.items()} | {
            "time/step_s": step_s,
            "time/driver_s": step_s - sum(totals.values()),
        }

    def told(self, what: str) -> str:
        """Ends a lap. Returns a line about it, such as "ready after 41.3 s: ray 3.4, workers 26.6, sync 4.8, driver 6.5"."""
        times = {name.removeprefix("time/").removesuffix("_s"): seconds for name, seconds in self.lap().items()}
        total = times.pop("step")
        return f"{what} after {total:.1f} s: " + ", ".join(f"{name} {s:.1f}" for name, s in times.items() if s >= 0.05)

    def lap(self) -> dict[str, float]:
        """Ends a lap. Returns its seconds by phase, in total, and of the driver between phases."""
        assert not self._open, f"a lap ends between phases, but {self._open} is open"
        times = self.so_far()
        self._started += times["time/step_s"]
        self._totals = {}
        return times
