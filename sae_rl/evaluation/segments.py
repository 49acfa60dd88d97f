"""Segments of evaluated responses, where the logprobs that came with them say enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sae_rl.algo.segmentation import Segmenter, segment
from sae_rl.types import Batch, Rollout, Sampling, Scores


@dataclass(frozen=True, slots=True)
class Segments:
    """Where responses split."""

    batch: Batch  # the responses that were cut, sampled tokens only
    opens: Tensor  # (N,) of that batch

    def per_response(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """(T,) of each response; false, or 0, at tokens that nobody sampled."""
        own = self.opens.split(self.batch.lengths.tolist())
        return [
            torch.zeros(r.token_ids.shape, dtype=self.opens.dtype).masked_scatter(r.dense_action_mask, opens)
            for r, opens in zip(rollouts, own, strict=True)
        ]


class NotScoredError(Exception):
    """A segmenter asked for what only the trained networks know."""


class Unscored:
    """In the place of `Scores`: an evaluation has no policy, critic or reference to ask."""

    def __getattr__(self, name: str) -> Any:
        raise NotScoredError(name)


def cut(rollouts: Sequence[Rollout], segmenter: Segmenter, sampling: Sampling) -> Segments | str:
    """The segments of evaluated responses, or why there are none.

    vLLM's logprobs are of the distribution that it sampled from. A temperature is part of the policy, in training as
    here; but a truncated distribution or one under a penalty is another one, whose probabilities no run segments by.
    """
    changed = [f"evaluation.{key} = {value:g}" for key, value, _ in sampling.changes()]
    if sampling.temperature == 0:
        changed.append("evaluation.temperature = 0")
    if changed:
        return f"{', '.join(changed)}: the logprobs are not those of a policy that a run would segment"
    batch = Batch.of([_sampled_part(rollout) for rollout in rollouts], [0.0] * len(rollouts))
    try:
        return Segments(batch, segment(segmenter, batch, cast(Scores, Unscored())))
    except NotScoredError as missing:
        return f"the segmenter {type(segmenter).__name__} reads scores.{missing}, which an evaluation does not compute"


def _sampled_part(rollout: Rollout) -> Rollout:
    if rollout.action_mask is None:
        return rollout
    return replace(
        rollout,
        token_ids=rollout.token_ids[rollout.action_mask],
        rollout_logprobs=rollout.rollout_logprobs[rollout.action_mask],
        policy_versions=rollout.policy_versions[rollout.action_mask],
        action_mask=None,
    )
