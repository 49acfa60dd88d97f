"""What is measured on a set of responses: advantages of several estimators, and returns of continuations from many places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_rl.types import Batch, offsets_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Estimators and Monte-Carlo references on the same responses.

    A place is the state before its token is read. Neutral places follow from positions alone, never from what was sampled;
    others are where segments open. The first token of each response is a neutral place.
    """

    batch: Batch  # responses; ``groups`` numbers the prompts from 0
    returns: Tensor  # (B,) float64 return of each response itself
    places: Tensor  # (P,) int64 indices into the flat (N,) tensors, increasing
    neutral: Tensor  # (P,) bool
    continued: Tensor  # (P, k) float64 returns of k independent continuations from each place; NaN: its check failed
    names: tuple[str, ...]  # (E,) of the estimators
    advantages: Tensor  # (E, N) float64, before whitening
    opens: Tensor  # (E, N) float32, the segments of each estimator
    # (E + 1, G, D) float32, sum over the responses to a prompt and their tokens of A_t grad log pi(a_t | s_t), projected
    # to D numbers so that inner products keep their expectation; the last has `block_advantages` as A_t.
    gradients: Tensor | None = None

    @property
    def num_prompts(self) -> int:
        """G."""
        return int(self.batch.groups.max()) + 1


def reference_values(measurements: Measurements, columns: Tensor | None = None) -> Tensor:
    """(P,) float64 mean return of the continuations ``columns`` of each place (None: of all); NaN where all failed."""
    continued = measurements.continued
    return (continued if columns is None else continued[:, columns]).nanmean(1)


def block_advantages(measurements: Measurements, values: Tensor) -> Tensor:
    """The advantage of each block of tokens between two neutral places: V at its end minus V at its begin.

    The last block of a response ends with the response's own return. Where blocks end does not depend on what was sampled, so
    ``A_t grad log pi(a_t | s_t)`` has the policy gradient as its expectation, whatever the distance between places.

    Args:
        values: (P,) float64 V at the places.

    Returns:
        (N,) float64.
    """
    batch, places = measurements.batch, measurements.places[measurements.neutral]
    values = values[measurements.neutral]
    response = torch.searchsorted(batch.offsets, places, right=True) - 1
    is_last = torch.cat([response.diff() != 0, torch.ones(1, dtype=torch.bool)])
    ends = torch.where(is_last, measurements.returns[response], values.roll(-1))
    lengths = torch.cat([places, torch.tensor([batch.num_tokens])]).diff()
    return (ends - values).repeat_interleave(lengths)


def neutral_places(lengths: Tensor, every: int) -> Tensor:
    """(P,) places in responses of ``lengths`` (B,): first tokens, and pairs of neighbours ``every`` tokens apart.

    The values at a pair (t, t + 1) give the advantage of token t itself. With ``every = 1`` each token is a place. The first
    pair of a response shifts from response to response, so that all positions occur.
    """
    offsets = offsets_of(lengths.tolist())
    response = torch.arange(lengths.numel()).repeat_interleave(lengths)
    position = torch.arange(int(offsets[-1])) - offsets[:-1][response]
    phase = (position + response) % every
    return ((phase == 0) | (phase == 1 % every) | (position == 0)).nonzero().flatten()
