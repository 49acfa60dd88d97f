"""Responses and their rewards, checked while others are still sampled; and which groups a step trains on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_rl.config.schema import Config, DynamicSamplingConfig
from sae_rl.data.sampler import PromptSampler, SamplerState
from sae_rl.protocols import Metrics, RolloutEngines, Scoring
from sae_rl.records.clock import Clock
from sae_rl.rewards.pool import Check, RewardPool, Rewards
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.types import Prompt, Rollout, Sampling


@dataclass(frozen=True, slots=True)
class FailedRule:
    """What becomes of responses whose check failed."""

    leave_out: bool  # of the update; otherwise they score as the reward pool says
    smallest_group: int  # of what is left of a group; estimators that compare responses need two

    @staticmethod
    def of(config: Config) -> FailedRule:
        return FailedRule(config.rewards.failed == "leave_out", 1 if config.algorithm.needs_critic else 2)

    def keeps(self, outcome: Verdict | Failed) -> bool:
        return not self.leave_out or isinstance(outcome, Verdict)


class Early:
    """Hands on parts of a batch while the rest is sampled: consecutive prompts, so that no part depends on who was first.

    Args:
        start: what is done with the responses of a part.
    """

    def __init__(self, num_parts: int, start: Callable[[list[Rollout]], Any]) -> None:
        self._num_parts, self._start = num_parts, start
        self._started: dict[int, Any] = {}

    def take(self, prompts: Sequence[Prompt], groups: Mapping[str, list[Rollout]]) -> None:
        """Starts the parts whose groups are all there."""
        size = math.ceil(len(prompts) / self._num_parts)
        for first in range(0, len(prompts), size):
            names = [prompt.id for prompt in prompts[first : first + size]]
            if first not in self._started and all(name in groups for name in names):
                self._started[first] = self._start([rollout for name in names for rollout in groups[name]])

    @property
    def started(self) -> list[Any]:
        """What was started, in the order of the prompts."""
        return [self._started[first] for first in sorted(self._started)]


def sample(
    prompts: Sequence[Prompt],
    engines: RolloutEngines,
    rewards: RewardPool,
    clock: Clock,
    *,
    group_size: int,
    sampling: Sampling,
    seed_name: str,
    early: Early | None = None,
) -> tuple[list[Rollout], Rewards]:
    """``group_size`` responses to each prompt, in the order of the prompts, and their rewards.

    Args:
        early: what else to do with some of them while others are sampled.

    Raises:
        RuntimeError: no engine is left, or too many checks failed.
    """
    groups: dict[str, list[Rollout]] = {}
    checks: dict[str, list[Check]] = {}
    with clock.phase("generate"):
        for group in engines.generate(prompts, group_size=group_size, sampling=sampling, seed_name=seed_name):
            name = group[0].prompt.id
            groups[name], checks[name] = group, rewards.submit(group)
            if early is not None:
                early.take(prompts, groups)
    with clock.phase("reward"):  # what is left of it
        return (
            [rollout for prompt in prompts for rollout in groups[prompt.id]],
            rewards.collect([check for prompt in prompts for check in checks[prompt.id]]),
        )


@dataclass(frozen=True, slots=True)
class StepSamples:
    """What a step trains on: group after group."""

    rollouts: list[Rollout]
    scores: list[float]  # R(x, y) of each
    reasons: list[str]  # of each, what the verifier says
    metrics: Metrics
    sampler: SamplerState  # behind them: what a checkpoint of this step goes on from
    scoring: Sequence[Scoring] = ()  # begun while others were sampled; empty: not begun
    scored_rows: Sequence[int] = ()  # which responses of what `scoring` holds these are


Respond = Callable[[list[Prompt], int], tuple[list[Rollout], Rewards]]


@dataclass(frozen=True, slots=True)
class Group:
    """What is learnt from of the responses to one prompt."""

    rows: list[int]  # of the round's responses
    rollouts: list[Rollout]
    scores: list[float]
    reasons: list[str]


def groups_of(rollouts: Sequence[Rollout], rewards: Rewards, group_size: int, rule: FailedRule) -> list[Group]:
    """By prompt, without responses whose check failed, if the rule leaves them out; a group may end empty."""
    scores, reasons = rewards.scores, rewards.reasons
    groups = []
    for first in range(0, len(rollouts), group_size):
        rows = [i for i in range(first, first + group_size) if rule.keeps(rewards.outcomes[i])]
        if len(rows) < rule.smallest_group:
            rows = []
        groups.append(Group(rows, [rollouts[i] for i in rows], [scores[i] for i in rows], [reasons[i] for i in rows]))
    return groups


def tell(sampler: PromptSampler, prompts: Sequence[Prompt], groups: Sequence[Group]) -> None:
    """The sampler learns what the groups scored, also those that the step does not train on."""
    told = [(prompt, group) for prompt, group in zip(prompts, groups, strict=True) if group.scores]
    sampler.observe([prompt for prompt, _ in told], [sum(group.scores) / len(group.scores) for _, group in told])


def collect(
    sampler: PromptSampler,
    num_prompts: int,
    group_size: int,
    config: DynamicSamplingConfig,
    rule: FailedRule,
    respond: Respond,
) -> StepSamples:
    """The groups of one step, ``num_prompts`` of them unless some are left out.

    Whole rounds are waited for, and useful groups are taken in the order of the prompts: stopping at the first so many
    that come in would prefer short responses, and no run could be repeated. Prompts whose groups are not needed go back
    to the sampler, and are sampled anew in the next step, from its policy.

    Args:
        respond: (prompts, round) -> their responses and rewards.

    Raises:
        RuntimeError: no group of any round is of use.
    """
    kept: list[Group] = []
    seen: set[str] = set()
    scores: list[float] = []
    num_failed, round_number = 0, 0
    for round_number in range(1, (config.max_rounds if config.mode == "resample" else 1) + 1):
        missing = num_prompts - len(kept)
        wanted = missing if config.mode == "none" else math.ceil(missing * config.oversampling)
        drawn = sampler.next(min(wanted, len(sampler.prompts)))
        prompts = [prompt for prompt in drawn if prompt.id not in seen]
        sampler.put_back([prompt for prompt in drawn if prompt.id in seen])  # a new epoch began within the step
        if not prompts:
            break
        seen |= {prompt.id for prompt in prompts}
        rollouts, rewards = respond(prompts, round_number)
        scores += rewards.scores
        num_failed += len(rewards.failures)
        groups = groups_of(rollouts, rewards, group_size, rule)
        tell(sampler, prompts, groups)
        useful = [i for i, group in enumerate(groups) if group.rows and is_useful(group.scores, config)]
        kept += [groups[i] for i in useful[:missing]]
        sampler.put_back([prompts[i] for i in useful[missing:]])
        if len(kept) == num_prompts:
            break
    if not kept and config.mode != "none":
        raise RuntimeError(
            f"none of {len(scores) // group_size} groups in {round_number} round(s) is of use by rollout.dynamic_sampling.by = "
            f"{config.by}; the mean reward is {sum(scores) / len(scores):.3g}: choose problems that are easier or harder, "
            "or set rollout.dynamic_sampling.mode=none"
        )
    metrics = {"reward/failed_fraction": num_failed / len(scores)}
    if config.mode != "none":
        metrics["sampling/reward_mean"] = sum(scores) / len(scores)
        metrics["sampling/kept_fraction"] = sum(len(group.rows) for group in kept) / len(scores)
        metrics["sampling/num_rounds"] = float(round_number)
    return collected(kept, metrics, sampler.state())


def collected(groups: Sequence[Group], metrics: Metrics, sampler: SamplerState) -> StepSamples:
    """A step's groups, one after the other.

    Raises:
        RuntimeError: no response is left in them.
    """
    if not any(group.rows for group in groups):
        raise RuntimeError("nothing is left to learn from: the checks of all responses failed")
    return StepSamples(
        [rollout for group in groups for rollout in group.rollouts],
        [score for group in groups for score in group.scores],
        [why for group in groups for why in group.reasons],
        metrics,
        sampler,
        scored_rows=[row for group in groups for row in group.rows],
    )


def is_useful(scores: Sequence[float], config: DynamicSamplingConfig) -> bool:
    """Whether a step should train on a group with these rewards."""
    if config.mode == "none":
        return True
    if config.by == "variance":
        return max(scores) > min(scores)
    return config.success_low <= sum(scores) / len(scores) <= config.success_high
