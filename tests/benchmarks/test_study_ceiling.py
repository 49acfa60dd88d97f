"""The true values of Level, against rewards of the task's own demonstrations and its verifier."""

import random

import pytest

from benchmarks.study.ceiling import values_and_return
from sae_rl.tasks.level import Level, level


def test_first_value_is_the_mean_reward_of_demonstrations() -> None:
    task = Level(num_steps=4, need=2)
    for index in range(3):
        problem = task.problem(0, "train", index)
        rng = random.Random(index)
        rewards = [level(problem.prompt, task.demonstration(problem, rng), problem.answer) for _ in range(4000)]
        (first, *_), _ = values_and_return(task, problem.prompt, random.Random(0))
        assert first == pytest.approx(sum(rewards) / len(rewards), abs=4 * 0.5 / 4000**0.5)


def test_values_belong_to_tokens_and_end_at_the_reward() -> None:
    task = Level(random_fraction=0.0)  # the demonstration then uses one more draw for each decision than the values do
    problem = task.problem(0, "train", 0)
    values, reward = values_and_return(task, problem.prompt, _Skipping(7))
    response = task.demonstration(problem, random.Random(7))
    assert len(values) == len(response.split()) + 1  # and the end token
    assert values[-1] == reward == level(problem.prompt, response, problem.answer)


class _Skipping(random.Random):
    """Drops the draw with which a demonstration decides whether an action is uniform."""

    def choices(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.random()
        return super().choices(*args, **kwargs)
