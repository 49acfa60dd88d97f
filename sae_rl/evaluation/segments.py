"""Segments of evaluated responses, where the logprobs from vLLM suffice to find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_rl.algo.segmentation import Segmenter, segment
from sae_rl.types import Batch, Rollout, Sampling, Scores, sampled_only


@dataclass(frozen=True, slots=True)
class Segments:
    """Where responses are cut."""

    batch: Batch  # the sampled tokens of all responses
    opens: Tensor  # (N,) of that batch

    def per_response(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """(T,) for each response; false, or 0, at tokens that the policy did not sample."""
        own = self.opens.split(self.batch.lengths.tolist())
        return [
            torch.zeros(r.token_ids.shape, dtype=self.opens.dtype).masked_scatter(r.dense_action_mask, opens)
            for r, opens in zip(rollouts, own, strict=True)
        ]


class NotScoredError(Exception):
    """A segmenter read a field of `Unscored`."""


class Unscored(Scores):
    """The scores of an evaluation, which has no trained networks: every field raises `NotScoredError`."""

    __slots__ = ()

    def __init__(self) -> None:
        """Sets no field."""

    def __getattr__(self, name: str) -> Any:
        raise NotScoredError(name)


def cut(rollouts: Sequence[Rollout], segmenter: Segmenter, sampling: Sampling) -> Segments | str:
    """The segments of evaluated responses, or the reason why they are unknown.

    vLLM's logprobs belong to the distribution that it samples from. A temperature is part of the policy, both in
    training and here. A truncated or penalized distribution is another one, which no run segments by.
    """
    changed = [f"evaluation.{key} = {value:g}" for key, value, _ in sampling.changes()]
    if sampling.temperature == 0:
        changed.append("evaluation.temperature = 0")
    if changed:
        return f"{', '.join(changed)}: the logprobs are not those of a policy that a run would segment"
    batch = Batch.of(rollouts, [0.0] * len(rollouts))
    batch, _ = sampled_only(batch, Scores(old_logprobs=batch.rollout_logprobs, values=None, ref_logprobs=None))
    try:
        return Segments(batch, segment(segmenter, batch, Unscored()))
    except NotScoredError as missing:
        return f"the segmenter {type(segmenter).__name__} reads scores.{missing}, which an evaluation does not compute"
