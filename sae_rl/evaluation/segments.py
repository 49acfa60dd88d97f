"""Segments of evaluated responses, where the logprobs from vLLM suffice to find them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_rl.algo.segmentation import Segmenter, segment
from sae_rl.plugins import PlugInError
from sae_rl.types import Batch, Rollout, Sampling, Scores, sampled_only


def cut(rollouts: Sequence[Rollout], segmenter: Segmenter, sampling: Sampling) -> list[Tensor] | str:
    """(T,) for each response: which tokens open a segment; or the reason why that is unknown.

    Tokens that the policy did not sample have false, or 0.

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
    unscored = object.__new__(Scores)  # without fields: reading one raises AttributeError
    try:
        opens = segment(segmenter, batch, unscored)
    except (AttributeError, PlugInError) as error:
        missing = error.__cause__ if isinstance(error, PlugInError) else error
        if not isinstance(missing, AttributeError) or missing.obj is not unscored:
            raise
        return f"the segmenter {type(segmenter).__name__} reads scores.{missing.name}, which an evaluation does not compute"
    return [
        torch.zeros(r.token_ids.shape, dtype=opens.dtype).masked_scatter(r.dense_action_mask, sampled)
        for r, sampled in zip(rollouts, opens.split(batch.lengths.tolist()), strict=True)
    ]
