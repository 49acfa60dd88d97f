"""Where a response splits into segments. A new segmenter is one class here and one line in `SEGMENTERS`.

A segmenter returns ``opens`` (N,): true where a token opens a new segment. The first token of a response always opens,
so ``opens.sum()`` counts segments. A soft segmenter returns weights in [0, 1] instead, which `SAE` takes as they are.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_rl.algo.knobs import check_integer, check_number
from sae_rl.algo.ragged import check_tokens, positions
from sae_rl.types import Batch, Scores


class Segmenter(Protocol):
    """(batch, scores) -> opens (N,), bool, or float in [0, 1]."""

    def __call__(self, batch: Batch, scores: Scores) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LowProbability:
    """A token opens a segment where the policy that sampled it was unsure: ``pi_rollout(a_t | s_t) < p``.

    The segmenter of SAE, arXiv 2601.07320. p = 0 opens no inner segment and turns SAE into Monte Carlo. The token that
    opens is itself drawn at s_t, not known there, so the trace is cut on a condition that A_t is correlated with: with
    lam < 1 SAE is biased even under an exact critic. Where the prefix decides, as in the other segmenters, it is not.
    """

    p: float = 0.2  # in [0, 1]

    def __post_init__(self) -> None:
        check_number("LowProbability.p", self.p, 0, 1)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        check_tokens("batch.rollout_logprobs", batch.rollout_logprobs, batch)
        return _with_first_tokens(batch.rollout_logprobs.exp() < self.p, batch)


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Every ``num_tokens``-th token of a response opens a segment: ``t mod num_tokens = 0``.

    The control for SAE (arXiv 2601.07320) that asks whether the place of a boundary matters. 1 turns SAE into GAE.
    """

    num_tokens: int  # at least 1

    def __post_init__(self) -> None:
        check_integer("FixedLength.num_tokens", self.num_tokens, 1)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        return positions(batch.offsets) % self.num_tokens == 0


@dataclass(frozen=True, slots=True)
class Random:
    """Each token opens a segment with probability ``rate``, whatever it is: the control for another segmenter's rate.

    That rate is the metric ``segment/opens_fraction``. The draws of a response are a function of the seed and its token
    ids: the same on every rank, in every order of the batch and after a restart, and new where the policy writes anew.
    """

    rate: float  # in [0, 1]
    seed: int = 0  # at least 0

    def __post_init__(self) -> None:
        check_number("Random.rate", self.rate, 0, 1)
        check_integer("Random.seed", self.seed, 0)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        token_ids = batch.token_ids.to("cpu", torch.int64).numpy()
        draws = [self._draws(token_ids[start:end]) for start, end in pairwise(batch.offsets.tolist())]
        return _with_first_tokens(torch.from_numpy(np.concatenate(draws) < self.rate), batch)

    def _draws(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """(T,) uniform in [0, 1), from a generator of the response's own."""
        generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(token_ids.tobytes())]))
        return generator.random(token_ids.size)


@dataclass(frozen=True, slots=True)
class Delimiter:
    """The token *after* a delimiter opens a segment, ``a_{t-1} in token_ids``; the delimiter closes the segment before.

    Newlines or step marks as in AlphaMath (arXiv 2405.03553). Of a run of delimiters, each but the first opens too.
    """

    token_ids: tuple[int, ...]  # at least one, each at least 0

    def __post_init__(self) -> None:
        if not isinstance(self.token_ids, tuple) or not self.token_ids:
            raise ValueError(
                f"Delimiter.token_ids = {self.token_ids!r}, but it must be a tuple of token ids, not empty"
            )
        for token_id in self.token_ids:
            check_integer("Delimiter.token_ids", token_id, 0)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        delimiters = torch.isin(batch.token_ids, torch.tensor(self.token_ids))
        return _with_first_tokens(delimiters.roll(1), batch)


def _with_first_tokens(opens: Tensor, batch: Batch) -> Tensor:
    """Forces the first token of every response to open a segment."""
    return opens.index_fill(0, batch.offsets[:-1], True)


SEGMENTERS: dict[str, type[Segmenter]] = {
    "low_probability": LowProbability,
    "fixed_length": FixedLength,
    "random": Random,
    "delimiter": Delimiter,
}
