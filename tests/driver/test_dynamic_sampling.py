"""Which groups a step trains on: those that teach something, in an order that no timing decides."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sae_rl.config.schema import Config, DynamicSamplingConfig
from sae_rl.data.sampler import Sampler
from sae_rl.driver import train
from sae_rl.rewards.pool import Rewards
from sae_rl.rewards.verdict import Verdict
from sae_rl.rollouts.groups import StepSamples
from sae_rl.rollouts.step import collect, is_useful
from sae_rl.types import Prompt, Rollout
from tests.driver.scripted import ScriptedWorkers, make_config, make_prompts, make_rollout, make_run


def settings(mode: str = "resample", **more: Any) -> DynamicSamplingConfig:
    defaults = {"by": "variance", "success_low": 0.2, "success_high": 0.8, "oversampling": 1.0, "max_rounds": 5}
    return DynamicSamplingConfig.model_validate({"mode": mode, **defaults, **more})


class Engines:
    """Responses whose rewards are those that a table says of their prompt."""

    def __init__(self, rewards: dict[str, list[float]]) -> None:
        self.rewards = rewards
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[Prompt], round_number: int) -> tuple[list[Rollout], Rewards]:
        assert round_number == len(self.asked) + 1
        self.asked.append([p.id for p in prompts])
        rollouts = [make_rollout(p, i, 0, 1.0) for p in prompts for i in range(2)]
        return rollouts, Rewards([Verdict(r, "") for p in prompts for r in self.rewards[p.id]])


MIXED, RIGHT, WRONG = [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]


@cache
def base_config() -> Config:
    return make_config(Path("unused"))


def collected(sampler: Sampler, num_prompts: int, dynamic: DynamicSamplingConfig, engines: Engines) -> StepSamples:
    config = base_config()
    changed = {"prompts_per_step": num_prompts, "dynamic_sampling": dynamic}
    return collect(config.model_copy(update={"rollout": config.rollout.model_copy(update=changed)}), sampler, engines)


def in_order(sampler: Sampler) -> list[str]:
    """The ids that a fresh sampler like this one hands out."""
    return [p.id for p in Sampler(sampler.prompts, 0).next(len(sampler.prompts))]


def kept(found: StepSamples) -> list[str]:
    assert [r.sample for r in found.rollouts] == [0, 1] * (len(found.rollouts) // 2)
    return [r.prompt.id for r in found.rollouts[::2]]


def test_useless_groups_are_left_out_or_sampled_again() -> None:
    sampler = Sampler(make_prompts(10), 0)
    order = in_order(sampler)
    table = {name: MIXED if i % 2 else RIGHT for i, name in enumerate(order)}
    assert kept(collected(sampler, 4, settings("none"), Engines(table))) == order[:4]
    sampler = Sampler(make_prompts(10), 0)
    filtered = collected(sampler, 4, settings("filter"), Engines(table))
    assert kept(filtered) == [order[1], order[3]] and filtered.rewards == [1.0, 0.0] * 2
    assert filtered.metrics == {
        "reward/failed_fraction": 0.0,
        "sampling/reward_mean": 0.75,
        "sampling/kept_fraction": 0.5,
        "sampling/num_rounds": 1.0,
    }
    sampler, engines = Sampler(make_prompts(10), 0), Engines(table)
    resampled = collected(sampler, 4, settings(), engines)
    assert kept(resampled) == [order[1], order[3], order[5], order[7]]
    assert engines.asked == [order[:4], order[4:6], [order[6]], [order[7]]]
    assert [p.id for p in sampler.next(1)] == [order[8]]


def test_what_is_not_needed_goes_back_to_the_sampler() -> None:
    sampler = Sampler(make_prompts(10), 0)
    order, engines = in_order(sampler), Engines({p.id: MIXED for p in sampler.prompts})
    found = collected(sampler, 3, settings(oversampling=1.5), engines)
    assert engines.asked == [order[:5]] and kept(found) == order[:3]
    assert [p.id for p in sampler.next(4)] == order[3:7]


def test_rounds_end_and_no_prompt_is_asked_twice_in_a_step() -> None:
    sampler = Sampler(make_prompts(4), 0)
    order = in_order(sampler)
    table = {name: RIGHT for name in order} | {order[2]: MIXED}
    engines = Engines(table)
    assert kept(collected(sampler, 2, settings(max_rounds=9), engines)) == [order[2]]
    assert [name for names in engines.asked for name in names] == order, "nothing else is left to ask"
    assert sampler.epoch == 1 and len(sampler.next(4)) == 4
    capped = Engines(table)
    assert kept(collected(Sampler(make_prompts(4), 0), 3, settings(max_rounds=1), capped)) == [order[2]]


def test_a_step_without_a_useful_group_ends_the_run_with_a_message() -> None:
    sampler = Sampler(make_prompts(6), 0)
    with pytest.raises(RuntimeError, match=r"none of 4 groups in 2 round\(s\).*the mean reward is 0:.*mode=none"):
        collected(sampler, 2, settings(max_rounds=2), Engines({p.id: WRONG for p in sampler.prompts}))


@pytest.mark.parametrize(
    ("scores", "by_variance", "by_success_rate"),
    [
        ([0, 0, 0, 0], False, False),
        ([1, 1, 1, 1], False, False),
        ([1, 0, 0, 0], True, True),
        ([1, 0.9, 1, 1], True, False),
    ],
)
def test_what_is_useful(scores: list[float], by_variance: bool, by_success_rate: bool) -> None:
    assert is_useful(scores, settings()) is by_variance
    assert is_useful(scores, settings(by="success_rate")) is by_success_rate
    assert is_useful(scores, settings("none"))


def test_a_run_trains_on_useful_groups_alone_and_resumes(tmp_path: Path) -> None:
    options = ["rollout.dynamic_sampling.mode=resample", "algorithm=grpo"]
    workers = ScriptedWorkers()
    train(make_run(make_config(tmp_path / "straight", *options), workers))
    batches = [call.of["batch"] for call in workers.asked("score")]
    assert len(batches) == 6
    for batch in batches:
        groups = [set(batch.rewards[batch.groups == group].tolist()) for group in range(int(batch.groups.max()) + 1)]
        assert 1 <= len(groups) <= 2 and all(len(rewards) == 2 for rewards in groups)
    seed_names = {call.of["seed_name"] for call in workers.asked("generate")}
    assert {"step 0", "step 1"} <= seed_names and any(" round 2" in seed_name for seed_name in seed_names)
    resumed = ScriptedWorkers()
    checkpoint = tmp_path / "straight" / "checkpoints" / "step_000002"
    train(make_run(make_config(tmp_path / "resumed", *options), resumed, resume_from=checkpoint))
    again = [call.of["batch"] for call in resumed.asked("score")]
    assert [b.token_ids.tolist() for b in again] == [b.token_ids.tolist() for b in batches[2:]]
