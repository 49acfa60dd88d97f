"""The learning rate of every update: a linear warm-up, then constant, linear or along a cosine to the run's last update."""

from __future__ import annotations

import math

from sae_rl.config.schema import OptimizerConfig


class LrSchedule:
    """Counts updates and says the learning rate of the next one.

    Args:
        options: with ``lr``, the peak, and the schedule's keys.
        num_updates: of the whole run; what comes after them has the last one's rate.
    """

    def __init__(self, options: OptimizerConfig, num_updates: int) -> None:
        self._options = options
        self._num_updates = num_updates
        self._held: float | None = None
        self.num_done = 0

    def hold(self, lr: float) -> None:
        """From now on this rate, behind the warm-up."""
        self._held = lr

    def restart(self) -> None:
        """The configured schedule from its beginning."""
        self._held, self.num_done = None, 0

    def next(self) -> float:
        """The rate of the next update, which counts as done."""
        options, update = self._options, self.num_done
        self.num_done += 1
        rise = min(1.0, (update + 1) / max(1, options.warmup_updates))
        if self._held is not None:
            return rise * self._held
        return rise * options.lr * self._decay(update)

    def _decay(self, update: int) -> float:
        options = self._options
        if options.schedule == "constant":
            return 1.0
        num_decaying = max(1, self._num_updates - options.warmup_updates)
        progress = min(1.0, max(0.0, (update - options.warmup_updates) / num_decaying))
        left = 1 - progress if options.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return options.min_lr_fraction + (1 - options.min_lr_fraction) * left
