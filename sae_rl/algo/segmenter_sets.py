"""Segmenters made of segmenters, and the table of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sae_rl.algo.jit import compiled
from sae_rl.algo.segmenters import (
    AdaptiveProbability,
    Delimiter,
    Entropy,
    FixedLength,
    LowProbability,
    Random,
    Segmenter,
    Surprisal,
)
from sae_rl.knobs import check_integer
from sae_rl.types import Batch, Scores


@dataclass(frozen=True, slots=True)
class Union(Segmenter):
    """A token opens a segment where any of several segmenters says so; of soft ones, with the largest weight."""

    members: tuple[Segmenter, ...]  # at least one

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("Union.members is empty, but it must hold at least one segmenter")

    @property
    def needs_entropies(self) -> bool:  # type: ignore[override]
        return any(member.needs_entropies for member in self.members)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        opens = [member(batch, scores) for member in self.members]
        if all(each.dtype == torch.bool for each in opens):
            return torch.stack(opens).any(0)
        return torch.stack([each.to(batch.rollout_logprobs.dtype) for each in opens]).amax(0)


@dataclass(frozen=True, slots=True)
class MinimumLength(Segmenter):
    """Another segmenter's segments, none shorter than ``num_tokens`` but the last of a response.

    From the start of a response, a token that would open a segment too early does not.
    """

    segmenter: Segmenter  # a hard one
    num_tokens: int  # at least 1

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

    def __post_init__(self) -> None:
        check_integer("MinimumLength.num_tokens", self.num_tokens, 1)

    @property
    def needs_entropies(self) -> bool:  # type: ignore[override]
        return self.segmenter.needs_entropies

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        opens = self.segmenter(batch, scores)
        if opens.dtype != torch.bool:
            raise ValueError(
                f"MinimumLength.segmenter = {self.segmenter!r} gives weights, but it must give hard segments"
            )
        kept = opens.clone()
        _drop_early(kept.numpy(), batch.offsets.numpy(), self.num_tokens)
        return kept


def _drop_early_python(opens: Any, offsets: Any, num_tokens: int) -> None:
    for response in range(offsets.size - 1):
        last = offsets[response]
        for t in range(offsets[response] + 1, offsets[response + 1]):
            if opens[t]:
                if t - last < num_tokens:
                    opens[t] = False
                else:
                    last = t


_drop_early = compiled(_drop_early_python)


def with_vocabulary(segmenter: Segmenter, read_texts: Callable[[], Sequence[str]]) -> Segmenter:
    """The segmenter with the strings of its delimiters looked up in the vocabulary.

    Args:
        read_texts: gives the text of every token, by id; called only where there are strings.

    Raises:
        ValueError: no token contains a string.
    """
    if isinstance(segmenter, Delimiter) and segmenter.strings:
        return segmenter.with_vocabulary(read_texts())
    if isinstance(segmenter, Union):
        return Union(tuple(with_vocabulary(member, read_texts) for member in segmenter.members))
    if isinstance(segmenter, MinimumLength):
        return replace(segmenter, segmenter=with_vocabulary(segmenter.segmenter, read_texts))
    return segmenter


SEGMENTERS: dict[str, type[Segmenter]] = {
    "low_probability": LowProbability,
    "adaptive_probability": AdaptiveProbability,
    "entropy": Entropy,
    "surprisal": Surprisal,
    "fixed_length": FixedLength,
    "random": Random,
    "delimiter": Delimiter,
    "union": Union,
    "minimum_length": MinimumLength,
}
