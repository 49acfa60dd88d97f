"""Where a response splits into segments. A new segmenter is one class here and one line in `SEGMENTERS`
of `segmenter_sets`.

A segmenter returns ``opens`` (N,): true where a token opens a new segment. The first token of a response always opens,
so ``opens.sum()`` counts segments. A soft segmenter returns weights in [0, 1] instead, which `SAE` takes as they are.
Those that are made of other segmenters are in `segmenter_sets`. Called through `segment`, a segmenter sees only tokens
that the policy sampled.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_rl.algo.ragged import below, check_shape, check_tokens, positions
from sae_rl.knobs import check_choice, check_integer, check_number
from sae_rl.types import Batch, Scores, sampled_only

Boundary = Literal["opens", "closes"]


@runtime_checkable
class Segmenter(Protocol):
    """(batch, scores) -> opens (N,), bool, or float in [0, 1]."""

    needs_entropies: ClassVar[bool] = False  # true: it reads scores.entropies, which are only computed when asked for

    def __call__(self, batch: Batch, scores: Scores) -> Tensor: ...


def segment(segmenter: Segmenter, batch: Batch, scores: Scores) -> Tensor:
    """Where the responses of a batch split: (N,) bool, or weights in [0, 1]; false at tokens that nobody sampled.

    Raises:
        ValueError: the segmenter's answer has another shape or type, or is not in [0, 1].
    """
    name = f"the answer of {type(segmenter).__name__}"
    if batch.action_mask is None:
        return checked_opens(name, segmenter(batch, scores), batch)
    own, own_scores = sampled_only(batch, scores)
    opens = checked_opens(name, segmenter(own, own_scores), own)
    return torch.zeros(batch.num_tokens, dtype=opens.dtype).masked_scatter(batch.action_mask, opens)


def checked_opens(name: str, opens: Tensor, batch: Batch) -> Tensor:
    """``opens`` as it is, if it is bool, or float in [0, 1], for each token of the batch; else ValueError."""
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


@dataclass(frozen=True, slots=True)
class LowProbability(Segmenter):
    """A token opens a segment where the policy that sampled it was unsure: ``pi_rollout(a_t | s_t) < p``.

    The segmenter of SAE, arXiv 2601.07320. p = 0 opens no inner segment and turns SAE into Monte Carlo. The token that
    opens is itself drawn at s_t, not known there, so the trace is cut on a condition that A_t is correlated with: with
    lam < 1 SAE is biased even under an exact critic. Where the prefix decides, as in ``boundary="closes"`` and in most
    other segmenters, it is not.
    """

    p: float = 0.2  # in [0, 1]
    boundary: Boundary = "opens"  # the unsure token opens the new segment, or "closes" the old one and the next opens

    def __post_init__(self) -> None:
        check_number("LowProbability.p", self.p, 0, 1)
        check_choice("LowProbability.boundary", self.boundary, ("opens", "closes"))

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        check_shape("batch.rollout_logprobs", batch.rollout_logprobs, batch)
        log_p = math.log(self.p) if self.p > 0 else -math.inf
        unsure = below("batch.rollout_logprobs", batch.rollout_logprobs, log_p, batch.offsets)
        return _placed(unsure, self.boundary, batch)


@dataclass(frozen=True, slots=True)
class AdaptiveProbability(Segmenter):
    """The least probable tokens of the batch open segments, as many as are wanted: a threshold that follows the policy.

    Of the tokens that are not the first of a response, ``opens_fraction`` open; or so many that segments are
    ``segment_tokens`` long on average. Where probabilities tie at the threshold, fewer do.
    """

    opens_fraction: float | None = None  # in [0, 1]
    segment_tokens: float | None = None  # at least 1; one of the two is given
    boundary: Boundary = "opens"

    def __post_init__(self) -> None:
        if (self.opens_fraction is None) == (self.segment_tokens is None):
            raise ValueError(
                f"AdaptiveProbability has opens_fraction = {self.opens_fraction!r} and segment_tokens = "
                f"{self.segment_tokens!r}, but it must have exactly one of them"
            )
        if self.opens_fraction is not None:
            check_number("AdaptiveProbability.opens_fraction", self.opens_fraction, 0, 1)
        if self.segment_tokens is not None:
            check_number("AdaptiveProbability.segment_tokens", self.segment_tokens, 1)
        check_choice("AdaptiveProbability.boundary", self.boundary, ("opens", "closes"))

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        check_tokens("batch.rollout_logprobs", batch.rollout_logprobs, batch)
        inner = _inner(batch)
        if self.opens_fraction is not None:
            count = round(self.opens_fraction * int(inner.sum()))
        else:
            assert self.segment_tokens is not None
            count = round(batch.num_tokens / self.segment_tokens) - batch.num_responses
        return _placed(_lowest(batch.rollout_logprobs, inner, count), self.boundary, batch)


@dataclass(frozen=True, slots=True)
class Entropy(Segmenter):
    """A token opens a segment where the policy could have gone many ways: ``H(pi_old(. | s_t)) > threshold``.

    Or, with ``opens_fraction``, where the entropy is among the batch's highest. The entropy does not depend on the token
    that was sampled, so an exact critic stays unbiased under every lambda.
    """

    threshold: float | None = None  # nats, at least 0
    opens_fraction: float | None = None  # in [0, 1], of the tokens that are not the first; one of the two is given
    boundary: Boundary = "opens"

    needs_entropies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.opens_fraction is None):
            raise ValueError(
                f"Entropy has threshold = {self.threshold!r} and opens_fraction = {self.opens_fraction!r}, but it must "
                "have exactly one of them"
            )
        if self.threshold is not None:
            check_number("Entropy.threshold", self.threshold, 0)
        if self.opens_fraction is not None:
            check_number("Entropy.opens_fraction", self.opens_fraction, 0, 1)
        check_choice("Entropy.boundary", self.boundary, ("opens", "closes"))

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        if scores.entropies is None:
            raise ValueError(
                "scores.entropies is None, but the segmenter Entropy reads them: ask for them in the scores"
            )
        check_tokens("scores.entropies", scores.entropies, batch)
        if self.threshold is not None:
            return _placed(scores.entropies > self.threshold, self.boundary, batch)
        assert self.opens_fraction is not None
        inner = _inner(batch)
        count = round(self.opens_fraction * int(inner.sum()))
        return _placed(_lowest(-scores.entropies, inner, count), self.boundary, batch)


@dataclass(frozen=True, slots=True)
class Surprisal(Segmenter):
    """Soft segments: a token opens one with the weight ``w_t = min(1, -log pi_rollout(a_t | s_t) / tau)``.

    ``lambda_t = lam ^ w_{t+1}``, so that a step into a surprising token decays much and one into a certain token not at
    all; no published method. tau near 0 turns SAE into GAE, but for tokens of probability 1, and a large one into
    Monte Carlo.
    """

    tau: float = 1.6  # nats, above 0; 1.6 is the surprisal of the paper's threshold, p = 0.2

    def __post_init__(self) -> None:
        check_number("Surprisal.tau", self.tau, 0, above_low=True)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        check_tokens("batch.rollout_logprobs", batch.rollout_logprobs, batch)
        weights = (-batch.rollout_logprobs / self.tau).clamp(0, 1)
        return weights.index_fill(0, batch.offsets[:-1], 1.0)


@dataclass(frozen=True, slots=True)
class FixedLength(Segmenter):
    """Every ``num_tokens``-th token of a response opens a segment: ``t mod num_tokens = 0``.

    The control for SAE (arXiv 2601.07320) that asks whether the place of a boundary matters. 1 turns SAE into GAE.
    """

    num_tokens: int  # at least 1

    def __post_init__(self) -> None:
        check_integer("FixedLength.num_tokens", self.num_tokens, 1)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        return positions(batch.offsets) % self.num_tokens == 0


@dataclass(frozen=True, slots=True)
class Random(Segmenter):
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
class Delimiter(Segmenter):
    """The token *after* a delimiter opens a segment, ``a_{t-1} in token_ids``; the delimiter closes the segment before.

    Newlines or step marks as in AlphaMath (arXiv 2405.03553), whose step-level GAE is SAE over these segments. Of a run
    of delimiters, each but the first opens too.
    """

    token_ids: tuple[int, ...] = ()  # each at least 0
    strings: tuple[str, ...] = ()  # every token whose text contains one of them; see `with_vocabulary`

    def __post_init__(self) -> None:
        if not self.token_ids and not self.strings:
            raise ValueError("Delimiter has no token_ids and no strings, but it must have one of them")
        for name, kind in (("token_ids", int), ("strings", str)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(x, kind) for x in value):
                raise ValueError(f"Delimiter.{name} = {value!r}, but it must be a tuple of {kind.__name__}")
        for token_id in self.token_ids:
            check_integer("Delimiter.token_ids", token_id, 0)
        if "" in self.strings:
            raise ValueError("Delimiter.strings contains '', which every token contains")

    def with_vocabulary(self, texts: Sequence[str]) -> Delimiter:
        """With the ids of the tokens that contain one of its strings, in their place.

        Args:
            texts: of every token of the vocabulary, by id.

        Raises:
            ValueError: no token contains a string.
        """
        for string in self.strings:
            if not any(string in text for text in texts):
                raise ValueError(f"Delimiter.strings: no token of the tokenizer contains {string!r}")
        found = [i for i, text in enumerate(texts) if any(string in text for string in self.strings)]
        return Delimiter(token_ids=tuple(sorted({*self.token_ids, *found})))

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        if self.strings:
            raise ValueError(f"Delimiter.strings = {self.strings!r} need the tokenizer: call with_vocabulary first")
        return _placed(torch.isin(batch.token_ids, torch.tensor(self.token_ids)), "closes", batch)


def _placed(marks: Tensor, boundary: Boundary, batch: Batch) -> Tensor:
    """Marked tokens open segments, or close them so that the next token opens; and first tokens always open."""
    return _with_first_tokens(marks.roll(1) if boundary == "closes" else marks, batch)


def _inner(batch: Batch) -> Tensor:
    """(N,) true but at first tokens, which open anyway."""
    return torch.ones(batch.num_tokens, dtype=torch.bool).index_fill(0, batch.offsets[:-1], False)


def _lowest(flat: Tensor, among: Tensor, count: int) -> Tensor:
    """(N,) bool: the ``count`` lowest numbers among the marked, without those that tie with the next one."""
    candidates = flat[among]
    if count <= 0:
        return torch.zeros_like(among)
    if count >= candidates.numel():
        return among
    return among & (flat < candidates.kthvalue(count + 1).values)


def _with_first_tokens(opens: Tensor, batch: Batch) -> Tensor:
    """Forces the first token of every response to open a segment."""
    return opens.index_fill(0, batch.offsets[:-1], True)
