"""Samples groups of responses, checks them while others are still sampled, and leaves out failed checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from sae_rl.config.schema import Config
from sae_rl.data.sampler import PromptSampler, SamplerState
from sae_rl.protocols import Metrics, RolloutEngines
from sae_rl.records.clock import Clock
from sae_rl.rewards.pool import Check, RewardPool, Rewards
from sae_rl.rewards.verdict import Verdict
from sae_rl.types import Prompt, Rollout, Sampling

Checked = tuple[Rollout, Check]  # a response and its check, which may still run


@dataclass(frozen=True, slots=True)
class Group:
    """The responses to one prompt that a step may train on; it may be empty."""

    rollouts: list[Rollout]
    rewards: list[float]  # R(x, y) of each response
    reasons: list[str]  # why the verifier gave each reward

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)


@dataclass(frozen=True, slots=True)
class StepSamples:
    """The responses that one step trains on, group after group."""

    rollouts: list[Rollout]
    rewards: list[float]  # R(x, y) of each response
    reasons: list[str]  # why the verifier gave each reward
    metrics: Metrics
    sampler: SamplerState  # after these prompts were drawn; the step's checkpoint continues from it

    @staticmethod
    def of(groups: Sequence[Group], metrics: Metrics, sampler: SamplerState) -> StepSamples:
        """Concatenates groups.

        Raises:
            RuntimeError: all groups are empty.
        """
        if not any(group.rollouts for group in groups):
            raise RuntimeError("no response is left to train on: the checks of all responses failed")
        return StepSamples(
            [rollout for group in groups for rollout in group.rollouts],
            [reward for group in groups for reward in group.rewards],
            [reason for group in groups for reason in group.reasons],
            metrics,
            sampler,
        )


def sample(
    prompts: Sequence[Prompt],
    engines: RolloutEngines,
    rewards: RewardPool,
    clock: Clock,
    *,
    group_size: int,
    sampling: Sampling,
    seed_name: str,
    group_size_of: Mapping[str, int] | None = None,
) -> tuple[list[Rollout], Rewards]:
    """Samples ``group_size`` responses to each prompt and checks them; both results are in the order of the prompts.

    Args:
        group_size_of: `Prompt.task` -> responses to each of its prompts, where that differs from ``group_size``.

    Raises:
        RuntimeError: no engine is left, or too many checks failed.
    """
    found: dict[str, list[Checked]] = {}
    by_size: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_size.setdefault((group_size_of or {}).get(prompt.task, group_size), []).append(prompt)
    with clock.phase("generate"):
        for size, same in sorted(by_size.items(), key=itemgetter(0), reverse=True):
            for group in engines.generate(same, group_size=size, sampling=sampling, seed_name=seed_name):
                found[group[0].prompt.id] = list(zip(group, rewards.submit(group), strict=True))
    return collected(prompts, found, rewards, clock)


def collected(
    prompts: Sequence[Prompt], found: Mapping[str, list[Checked]], rewards: RewardPool, clock: Clock
) -> tuple[list[Rollout], Rewards]:
    """The responses by prompt id in the order of the prompts, and their rewards; waits for the checks that still run."""
    checked = [pair for prompt in prompts for pair in found[prompt.id]]
    with clock.phase("reward"):
        return [rollout for rollout, _ in checked], rewards.collect([check for _, check in checked])


def groups_of(config: Config, rollouts: Sequence[Rollout], rewards: Rewards) -> list[Group]:
    """Cuts a list of responses into groups. ``rewards.failed=leave_out`` leaves out responses whose check failed.

    A group becomes empty if too few responses are left: without a critic at least two are compared.
    """
    size, smallest = config.rollout.group_size, 2 if config.algorithm.compares_groups else 1
    is_kept = [config.rewards.failed == "score" or isinstance(outcome, Verdict) for outcome in rewards.outcomes]
    groups = []
    for first in range(0, len(rollouts), size):
        kept = [i for i in range(first, first + size) if is_kept[i]]
        if len(kept) < smallest:
            kept = []
        groups.append(
            Group([rollouts[i] for i in kept], [rewards.scores[i] for i in kept], [rewards.reasons[i] for i in kept])
        )
    return groups


def observe(sampler: PromptSampler, prompts: Sequence[Prompt], groups: Sequence[Group]) -> None:
    """Tells the sampler the mean reward of every group, also of groups that the step does not train on."""
    scored = [(prompt, group.mean_reward) for prompt, group in zip(prompts, groups, strict=True) if group.rewards]
    sampler.observe([prompt for prompt, _ in scored], [reward for _, reward in scored])
