"""Partial rollouts: a step takes the first groups that are done; the others go on, under newer weights, in the next.

So no engine idles while the longest responses of a step end. Every prompt is answered once, the long ones a step later, so
none is preferred in the long run; a token keeps the version of the weights that sampled it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_rl.config.schema import RolloutConfig
from sae_rl.data.sampler import PromptSampler
from sae_rl.protocols import RolloutEngines
from sae_rl.records.clock import Clock
from sae_rl.rewards.pool import Check, RewardPool
from sae_rl.rollouts.groups import FailedRule, StepSamples, collected, groups_of, tell
from sae_rl.types import Prompt, Rollout


@dataclass(slots=True)
class UnderWay:
    """A prompt whose group was asked for and has not been learnt from."""

    prompt: Prompt
    begun: int  # the step that asked for it
    rollouts: list[Rollout] | None = None  # None: not done
    checks: list[Check] | None = None


class PartialRollouts:
    """Keeps ``rollout.prompts_under_way`` prompts under way, over all steps of a run."""

    def __init__(
        self,
        sampler: PromptSampler,
        engines: RolloutEngines,
        rewards: RewardPool,
        clock: Clock,
        config: RolloutConfig,
        rule: FailedRule,
    ) -> None:
        assert config.prompts_under_way is not None, "otherwise every step waits for its own"
        self._sampler, self._rewards, self._clock, self._config = sampler, rewards, clock, config
        self._rule = rule
        self._num_under_way = config.prompts_under_way
        self._groups = engines.open(group_size=config.group_size, sampling=config.sampling(config.max_response_tokens))
        self._under_way: dict[str, UnderWay] = {}  # by prompt, in the order in which they were asked for

    def sample_step(self, step: int) -> StepSamples:
        """``rollout.prompts_per_step`` groups: those that a step left over, which are old enough, and the first others.

        Raises:
            RuntimeError: no engine is left, or too many checks failed.
        """
        self._ask(step)
        left_over = [name for name, group in self._under_way.items() if group.begun < step]
        done = [name for name, group in self._under_way.items() if group.rollouts is not None]
        wanted = self._config.prompts_per_step
        with self._clock.phase("generate"):
            while len(done) < wanted or not set(left_over) <= set(done):
                rollouts = next(self._groups)
                group = self._under_way[rollouts[0].prompt.id]
                group.rollouts, group.checks = rollouts, self._rewards.submit(rollouts)
                done.append(group.prompt.id)
        others = [name for name in done if name not in left_over]
        chosen = {*left_over, *others[: wanted - len(left_over)]}
        taken = [group for name, group in self._under_way.items() if name in chosen]
        self._under_way = {name: group for name, group in self._under_way.items() if name not in chosen}
        with self._clock.phase("reward"):
            rewards = self._rewards.collect([check for group in taken for check in group.checks or ()])
        metrics = {
            "reward/failed_fraction": rewards.failed_fraction,
            "sampling/left_over_fraction": len(left_over) / len(taken),
        }
        rollouts = [r for group in taken for r in group.rollouts or ()]
        groups = groups_of(rollouts, rewards, self._config.group_size, self._rule)
        tell(self._sampler, [group.prompt for group in taken], groups)
        state = self._sampler.state(unused=[group.prompt for group in self._under_way.values()])
        return collected(groups, metrics, state)

    def _ask(self, step: int) -> None:
        """As many new prompts as are missing."""
        missing = self._num_under_way - len(self._under_way)
        drawn = self._sampler.next(min(missing, len(self._sampler.prompts)))
        again = [prompt for prompt in drawn if prompt.id in self._under_way]  # a new epoch began
        prompts = [prompt for prompt in drawn if prompt.id not in self._under_way]
        self._sampler.put_back(again)
        self._under_way |= {prompt.id: UnderWay(prompt, step) for prompt in prompts}
        self._groups.add(prompts, f"step {step}")
