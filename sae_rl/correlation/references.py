"""Reference advantages from continuations: V where something ends, minus V where it begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_rl.correlation.measurements import Measurements, reference_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The tokens whose advantage is known, and the two places whose values give it.

    Index P + i is the end of response i: its value is the response's own return, without noise.
    """

    tokens: Tensor  # (n,) int64 indices into the flat (N,) tensors
    begins: Tensor  # (n,) int64 indices into (P,) places
    ends: Tensor  # (n,) int64 indices into (P,) places and (B,) ends of responses
    covered: float  # the fraction of segments, or of tokens wanted, whose values are known at both ends

    def advantages(self, measurements: Measurements, values: Tensor) -> Tensor:
        """(n,) float64, from V (P,) at the places."""
        known = torch.cat([values, measurements.returns])
        return known[self.ends] - known[self.begins]

    def noise(self, measurements: Measurements) -> Tensor:
        """(n,) float64, the variance of each advantage given its places; NaN without two continuations of each."""
        known = torch.cat([value_noise(measurements.continued), torch.zeros_like(measurements.returns)])
        return known[self.ends] + known[self.begins]


def value_noise(continued: Tensor) -> Tensor:
    """(P,) float64 unbiased variance of the mean return of each place's continuations; NaN where there are fewer than two."""
    counts = (~continued.isnan()).sum(1).double()
    squares = (continued - continued.nanmean(1, keepdim=True)).square().nansum(1)
    return torch.where(counts > 1, squares / (counts * (counts - 1)), torch.nan)


def token_reference(measurements: Measurements) -> Reference:
    """The neutral reference, ``A(t) = V(t + 1) - V(t)`` at pairs of neighbouring neutral places.

    Pairs follow from positions alone, so this reference favours no segmenter. At a response's last token Q is the return.
    The second place of a pair counts as a last token of its own only if all tokens are places; otherwise last tokens would
    count twice.
    """
    batch, places = measurements.batch, measurements.places
    neutral = torch.zeros(batch.num_tokens + 1, dtype=torch.bool)
    neutral[places[measurements.neutral]] = True
    is_last = torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, batch.offsets[1:] - 1, True)
    is_first = torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, batch.offsets[:-1], True)
    is_second = neutral[:-1].roll(1) & ~is_first & ~neutral[:-1].all()
    wanted = neutral[:-1] & torch.where(is_last, ~is_second, neutral[1:])
    index = _index_of_places(measurements)
    tokens = wanted.nonzero().flatten()
    response = torch.searchsorted(batch.offsets, tokens, right=True) - 1
    ends = torch.where(is_last[tokens], places.numel() + response, index[tokens + 1])
    return _known(measurements, tokens, index[tokens], ends, torch.ones_like(tokens))


def segment_reference(measurements: Measurements, opens: Tensor) -> Reference:
    """The paper's reference (arXiv 2601.07320): V at the end of a segment minus V at its begin, for each of its tokens.

    The last segment of a response ends with the response's own return. Segments without values at both ends are left out.

    Args:
        opens: (N,) a token opens a segment where this is at least 1/2, and at the begin of a response.
    """
    batch = measurements.batch
    begins = (opens >= 0.5).index_fill(0, batch.offsets[:-1], True).nonzero().flatten()
    response = torch.searchsorted(batch.offsets, begins, right=True) - 1
    is_last = torch.cat([response.diff() != 0, torch.ones(1, dtype=torch.bool)])
    index = _index_of_places(measurements)
    ends = torch.where(is_last, measurements.places.numel() + response, index[begins.roll(-1)])
    lengths = torch.cat([begins, torch.tensor([batch.num_tokens])]).diff()
    return _known(measurements, begins, index[begins], ends, lengths)


def _index_of_places(measurements: Measurements) -> Tensor:
    """(N + 1,) int64, the index of the place at each token, or -1."""
    places = measurements.places
    nowhere = torch.full((measurements.batch.num_tokens + 1,), -1)
    return nowhere.index_copy(0, places, torch.arange(places.numel()))


def _known(measurements: Measurements, firsts: Tensor, begins: Tensor, ends: Tensor, lengths: Tensor) -> Reference:
    """The sampled tokens of those stretches whose values are known at both ends, and not from a single continuation."""
    values = reference_values(measurements)
    if measurements.continued.shape[1] > 1:
        values = torch.where(value_noise(measurements.continued).isnan(), torch.nan, values)
    unknown = torch.cat([values.isnan(), torch.zeros(measurements.batch.num_responses + 1, dtype=torch.bool)])
    unknown[-1] = True  # index -1 is no place
    usable = ~unknown[begins] & ~unknown[ends]
    lengths = torch.where(usable, lengths, 0)
    stretch = torch.arange(firsts.numel()).repeat_interleave(lengths)
    within = torch.arange(stretch.numel()) - (lengths.cumsum(0) - lengths)[stretch]
    tokens = firsts[stretch] + within
    if measurements.batch.action_mask is not None:
        sampled = measurements.batch.action_mask[tokens]
        tokens, stretch = tokens[sampled], stretch[sampled]
    covered = float(usable.double().mean()) if usable.numel() else 0.0
    return Reference(tokens=tokens, begins=begins[stretch], ends=ends[stretch], covered=covered)
