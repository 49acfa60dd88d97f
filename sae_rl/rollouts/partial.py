"""Partial rollouts: more prompts are pending than a step needs, and a step trains on the groups that finish first.

The other groups continue under the next step's weights. Every group that a step leaves over belongs to the next step, so
short answers are preferred for one step at most, and no response is older than ``schedule.max_staleness``.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_rl.rewards.pool import Check
from sae_rl.rollouts.groups import StepSamples, groups_of, observe
from sae_rl.run import Run
from sae_rl.types import Prompt, Rollout


@dataclass(slots=True)
class PendingGroup:
    """A group that was requested and that no step has trained on yet."""

    prompt: Prompt
    step: int  # the step that requested it
    rollouts: list[Rollout] | None = None  # None: still being sampled
    checks: list[Check] | None = None


class PartialRollouts:
    """Keeps ``rollout.prompts_under_way`` prompts pending over all steps of a run."""

    def __init__(self, run: Run) -> None:
        rollout = run.config.rollout
        assert rollout.prompts_under_way is not None, "otherwise every step waits for its own prompts"
        self._run, self._config, self._num_pending = run, rollout, rollout.prompts_under_way
        self._groups = run.workers.rollout.open(
            group_size=rollout.group_size, sampling=rollout.sampling(rollout.max_response_tokens)
        )
        self._pending: dict[str, PendingGroup] = {}  # by prompt id, in the order of the requests

    def sample_step(self, step: int) -> StepSamples:
        """``rollout.prompts_per_step`` groups: all that the last step left over, then those that finish first.

        Raises:
            RuntimeError: no engine is left, or too many checks failed.
        """
        self._request(step)
        left_over = [name for name, group in self._pending.items() if group.step < step]
        taken = self._take(left_over)
        with self._run.clock.phase("reward"):
            rewards = self._run.rewards.collect([check for group in taken for check in group.checks or ()])
        metrics = {
            "reward/failed_fraction": rewards.failed_fraction,
            "sampling/left_over_fraction": len(left_over) / len(taken),
        }
        rollouts = [rollout for group in taken for rollout in group.rollouts or ()]
        groups = groups_of(self._run.config, rollouts, rewards)
        observe(self._run.sampler, [group.prompt for group in taken], groups)
        state = self._run.sampler.state(unused=[group.prompt for group in self._pending.values()])
        return StepSamples.of(groups, metrics, state)

    def _take(self, left_over: list[str]) -> list[PendingGroup]:
        """Waits until a step's groups are done, and removes them from the pending ones."""
        done = [name for name, group in self._pending.items() if group.rollouts is not None]
        wanted = self._config.prompts_per_step
        with self._run.clock.phase("generate"):
            while len(done) < wanted or not set(left_over) <= set(done):
                rollouts = next(self._groups)
                group = self._pending[rollouts[0].prompt.id]
                group.rollouts, group.checks = rollouts, self._run.rewards.submit(rollouts)
                done.append(group.prompt.id)
        others = [name for name in done if name not in left_over]
        chosen = {*left_over, *others[: wanted - len(left_over)]}
        taken = [group for name, group in self._pending.items() if name in chosen]
        self._pending = {name: group for name, group in self._pending.items() if name not in chosen}
        return taken

    def _request(self, step: int) -> None:
        """Requests as many new prompts as are missing."""
        sampler = self._run.sampler
        missing = self._num_pending - len(self._pending)
        drawn = sampler.next(min(missing, len(sampler.prompts)))
        sampler.put_back([prompt for prompt in drawn if prompt.id in self._pending])  # a new epoch began
        prompts = [prompt for prompt in drawn if prompt.id not in self._pending]
        self._pending |= {prompt.id: PendingGroup(prompt, step) for prompt in prompts}
        self._groups.add(prompts, f"step {step}")
