"""The learning rate of each update: linear warm-up, then a constant rate, or linear or cosine decay to the end of the run."""

from __future__ import annotations

import math

from sae_rl.config.schema import OptimizerConfig


class LrSchedule:
    """Counts updates and computes the learning rate of the next one.

    transformers' schedules start their warm-up at a rate of 0, which wastes the first update; this one starts a step higher.

    Args:
        options: the peak rate ``lr`` and the keys of the schedule.
        num_updates: updates of the whole run; later updates keep the final rate.
    """

    def __init__(self, options: OptimizerConfig, num_updates: int) -> None:
        self._options = options
        self._num_updates = num_updates
        self._constant_lr: float | None = None
        self.num_done = 0

    def hold(self, lr: float) -> None:
        """Uses the constant rate ``lr`` from now on, after the warm-up."""
        self._constant_lr = lr

    def restart(self) -> None:
        """Starts the configured schedule from its beginning."""
        self._constant_lr, self.num_done = None, 0

    def next(self) -> float:
        """Returns the rate of the next update and counts that update as done."""
        options, update = self._options, self.num_done
        self.num_done += 1
        warmup = min(1.0, (update + 1) / max(1, options.warmup_updates))
        if self._constant_lr is not None:
            return warmup * self._constant_lr
        return warmup * options.lr * self._decay(update)

    def _decay(self, update: int) -> float:
        options = self._options
        if options.schedule == "constant":
            return 1.0
        num_decaying = max(1, self._num_updates - options.warmup_updates)
        progress = min(1.0, max(0.0, (update - options.warmup_updates) / num_decaying))
        left = 1 - progress if options.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return options.min_lr_fraction + (1 - options.min_lr_fraction) * left
