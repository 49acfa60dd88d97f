"""What a segmenter is, and the checks that every segmenter passes. The segmenters themselves are in `segmenters`.

A segmenter returns ``opens`` (N,): true where a token opens a new segment. The first token of a response always opens one,
so ``opens.sum()`` is the number of segments. A soft segmenter returns weights in [0, 1], which `SAE` uses as they are.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from sae_rl.algo.ragged import check_shape, check_tokens
from sae_rl.types import Batch, Scores, sampled_only


@runtime_checkable
class Segmenter(Protocol):
    """(batch, scores) -> opens (N,), bool, or float in [0, 1].

    `segment` calls it with sampled tokens only. ``needs_entropies = True`` requests ``scores.entropies``, and
    ``needs_old_logprobs = True`` requests ``scores.old_logprobs``; otherwise they may be None.
    """

    needs_entropies: ClassVar[bool] = False
    needs_old_logprobs: ClassVar[bool] = False

    def __call__(self, batch: Batch, scores: Scores) -> Tensor: ...


def segment(segmenter: Segmenter, batch: Batch, scores: Scores) -> Tensor:
    """Segments of a batch: (N,) bool, or float weights in [0, 1]; false or 0 at tokens that the policy did not sample.

    Raises:
        ValueError: the segmenter's result has another shape or type, or is not in [0, 1].
    """
    name = f"the result of {type(segmenter).__name__}"
    if batch.action_mask is None:
        return checked_opens(name, segmenter(batch, scores), batch)
    sampled, sampled_scores = sampled_only(batch, scores)
    opens = checked_opens(name, segmenter(sampled, sampled_scores), sampled)
    return torch.zeros(batch.num_tokens, dtype=opens.dtype).masked_scatter(batch.action_mask, opens)


def checked_opens(name: str, opens: Tensor, batch: Batch) -> Tensor:
    """``opens``, unchanged. Raises ValueError unless it has one bool, or one float in [0, 1], per token of the batch."""
    if opens.dtype != torch.bool and not opens.is_floating_point():
        raise ValueError(f"{name} has type {opens.dtype}, allowed: bool, or float weights in [0, 1]")
    if opens.dtype == torch.bool:
        check_shape(name, opens, batch)
    else:
        check_tokens(name, opens, batch)
        lowest, highest = (float(end) for end in opens.aminmax())
        if lowest < 0 or highest > 1:
            raise ValueError(f"{name} spans [{lowest}, {highest}], but a segmenter's weights must be in [0, 1]")
    return opens
