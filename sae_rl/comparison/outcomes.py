"""What is compared of each run: numbers that follow from its learning curve.

A   runs (seeds) of an arm
E   evaluations that all runs have
K   quantities
P   held-out prompts
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sae_rl.comparison.curves import SUCCESS, TOKENS, Floats, RunCurves

REWARD = "rollout/reward_mean"
SCORES = ("final", "last", "area")  # linear in the scores of prompts, so that prompts can be resampled
DURATIONS = ("steps_to", "tokens_to")
OUTCOMES = {  # name: what a table calls it
    "final": "final score",
    "last": "mean of the last evaluations",
    "area": "area under the curve",
    "drawdown": "largest drawdown",
    "steps_to": "steps to the threshold",
    "tokens_to": "sampled tokens to the threshold",
}


def learning_curve(run: RunCurves, measure: str) -> dict[int, float]:
    """Held-out success, or else the reward of training, by the number of steps done."""
    if measure == SUCCESS:
        return dict(run.success)
    return {step + 1: value for step, value in run.training.get(measure, {}).items()}


@dataclass(frozen=True)
class Arm:
    """The complete runs of an arm, at the same evaluations."""

    name: str
    runs: Sequence[RunCurves]
    steps: tuple[int, ...]  # (E,)
    measure: str
    last_fraction: float  # the part of the steps whose evaluations `last` averages
    has_scores: bool  # whether the scores of prompts are used

    @property
    def seeds(self) -> list[str]:
        return [run.seed for run in self.runs]

    @cached_property
    def curves(self) -> Floats:
        """(A, E)"""
        return np.array([[learning_curve(run, self.measure)[step] for step in self.steps] for run in self.runs])

    @cached_property
    def linear(self) -> Floats:
        """(A, E + 3) the learning curve and `SCORES`; (A, E + 3, P) of each prompt where these are used."""
        if not self.has_scores:
            return np.asarray(self.curves @ self._weights)
        scores = np.array([[run.scores[step] for step in self.steps] for run in self.runs])  # (A, E, P)
        return np.moveaxis(np.moveaxis(scores, 1, 2) @ self._weights, 2, 1)

    @cached_property
    def _weights(self) -> Floats:
        """(E, E + 3) each evaluation, the last one, the mean of the last ones, and the trapezoids' mean over steps."""
        steps = np.array(self.steps, dtype=float)
        last, area = steps > (1 - self.last_fraction) * steps[-1], np.ones(1)
        if len(steps) > 1:
            gaps = np.diff(steps)
            area = (np.append(gaps, 0) + np.insert(gaps, 0, 0)) / 2 / gaps.sum()
        final = np.eye(len(steps))[-1]
        return np.column_stack([np.eye(len(steps)), final, last / last.sum(), area])

    @cached_property
    def tokens(self) -> Floats:
        """(A, E) tokens sampled until each evaluation; NaN where a step's are not known."""
        sums = [
            np.cumsum([0.0, *(run.training.get(TOKENS, {}).get(s, math.nan) for s in range(run.steps))])
            for run in self.runs
        ]
        return np.array([[of_run[step] for step in self.steps] for of_run in sums])

    @property
    def drawdowns(self) -> Floats:
        """(A,) the largest fall of a curve below its highest value before."""
        return np.asarray((np.maximum.accumulate(self.curves, axis=1) - self.curves).max(axis=1))

    def durations(self, threshold: float) -> tuple[Floats, Floats]:
        """(A, 2) steps and tokens to the first evaluation at ``threshold`` or above; and until where each run was observed.

        A run that never gets there has infinity: all that is known is that it takes longer than the run.
        """
        above = np.asarray(self.curves >= threshold)
        first, reached = above.argmax(axis=1), np.asarray(above.any(axis=1))
        both = np.stack([np.broadcast_to(self.steps, self.tokens.shape), self.tokens], axis=-1).astype(
            float
        )  # (A, E, 2)
        times = both[np.arange(len(both)), first]
        return np.where(reached[:, None], times, np.inf), both[:, -1]

    @property
    def diverged(self) -> int:
        """Runs whose final score is below their first one, or below half of their best one if that is positive."""
        final, best = self.curves[:, -1], self.curves.max(axis=1)
        return int(((final < self.curves[:, 0]) | ((best > 0) & (final < best / 2))).sum())


def halfway(arms: Sequence[Arm]) -> float:
    """A threshold half way from the mean first score of all runs to the best arm's mean final score, rounded to 0.01."""
    start = float(np.mean([arm.curves[:, 0].mean() for arm in arms]))
    return round((start + max(float(arm.curves[:, -1].mean()) for arm in arms)) / 2, 2)
