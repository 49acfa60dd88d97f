"""How much of the returns' variance the true value function of Level explains: no critic explains more in the mean.

    python -m benchmarks.study.ceiling [--responses 2000]

The policy is that of the demonstrations, which the base model imitates. Its values are exact: a state is the prompt, the
steps done, the level and the steps inside the band, and everything but the decisions follows from these. Explained
variance is 1 - Var(G - V) / Var(G) over the tokens of all responses, as in `critic/explained_variance`.
"""

from __future__ import annotations

import argparse
import math
import random
from functools import cache

import numpy as np

from sae_rl.tasks.level import Level, drifts_of


def clip(task: Level, level: int) -> int:
    return max(-task.limit, min(task.limit, level))


def probabilities(task: Level, level: int) -> list[float]:
    """Of each action of the demonstrations at a level."""
    weights = [math.exp(-abs(clip(task, level + action)) / task.temperature) for action in task.actions]
    random_share = task.random_fraction / len(task.actions)
    return [random_share + (1 - task.random_fraction) * weight / sum(weights) for weight in weights]


def values_and_return(task: Level, prompt: str, rng: random.Random) -> tuple[list[float], float]:
    """One response: the true value before each of its tokens, and its reward."""
    drifts = drifts_of(prompt)

    @cache
    def value(step: int, level: int, inside: int) -> float:
        """Of the state before the drift of a step."""
        if step == len(drifts):
            return float(inside >= task.need)
        at = clip(task, level + drifts[step])
        return sum(p * after(step, at, a, inside) for p, a in zip(probabilities(task, at), task.actions, strict=True))

    def after(step: int, level: int, action: int, inside: int) -> float:
        to = clip(task, level + action)
        return value(step + 1, to, inside + (abs(to) <= task.band))

    found: list[float] = []
    level, inside = 0, 0
    for step, drift in enumerate(drifts):
        before = value(step, level, inside)
        found += [before] * (2 + 2 * abs(drift) + 1)  # index, drift, its units, and the decision itself
        level = clip(task, level + drift)
        (action,) = rng.choices(task.actions, probabilities(task, level))
        decided = after(step, level, action, inside)
        level = clip(task, level + action)
        inside += abs(level) <= task.band
        found += [decided] * (2 * abs(action) + 1)  # its units, and the count of steps outside
    return [*found, float(inside >= task.need)], float(inside >= task.need)  # the end token


def ceiling(task: Level, num_responses: int, seed: int = 0) -> tuple[float, float]:
    """The mean reward and the explained variance of the true values."""
    rng = random.Random(seed)
    pairs = [values_and_return(task, task.problem(seed, "train", index).prompt, rng) for index in range(num_responses)]
    values = np.concatenate([found for found, _ in pairs])
    returns = np.concatenate([np.full(len(found), reward) for found, reward in pairs])
    return float(np.mean([reward for _, reward in pairs])), float(1 - np.var(returns - values) / np.var(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2000)
    success, explained = ceiling(Level(), parser.parse_args().responses)
    print(f"success of the demonstrations' policy {success:.3f}, explained variance of its true values {explained:.3f}")


if __name__ == "__main__":
    main()
