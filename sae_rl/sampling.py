"""Responses and their rewards: each group is checked while the engines still sample others."""

from __future__ import annotations

from collections.abc import Sequence

from sae_rl.clock import Clock
from sae_rl.protocols import RolloutEngines
from sae_rl.rewards.pool import Check, RewardPool, Rewards
from sae_rl.types import Prompt, Rollout


def sample(
    prompts: Sequence[Prompt],
    engines: RolloutEngines,
    rewards: RewardPool,
    clock: Clock,
    *,
    group_size: int,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    stream: str,
) -> tuple[list[Rollout], Rewards]:
    """``group_size`` responses to each prompt, in the order of the prompts, and their rewards.

    Raises:
        RuntimeError: no engine is left, or too many checks failed.
    """
    groups: dict[str, tuple[list[Rollout], list[Check]]] = {}
    with clock.phase("generate"):
        for group in engines.generate(
            prompts, group_size=group_size, max_tokens=max_tokens, temperature=temperature, top_p=top_p, stream=stream
        ):
            groups[group[0].prompt.id] = (group, rewards.submit(group))
    with clock.phase("reward"):  # what is left of it
        in_order = [groups[prompt.id] for prompt in prompts]
        return (
            [rollout for rollouts, _ in in_order for rollout in rollouts],
            rewards.collect([check for _, checks in in_order for check in checks]),
        )
