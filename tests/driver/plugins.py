"""A user's own segmenter and estimators, named by import path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_rl.algo import td_targets
from sae_rl.types import Batch, Scores, Targets


@dataclass(frozen=True)
class EntropyDrop:
    """Opens where the entropy falls by more than ``drop`` from one token to the next."""

    drop: float = 0.5

    needs_entropies: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        assert scores.entropies is not None
        falls = scores.entropies.diff(prepend=scores.entropies[:1]) < -self.drop
        return falls.index_fill(0, batch.offsets[:-1], True)


@dataclass(frozen=True)
class EverySecondGroup:
    """SAE whose lambda is read off everything that a plug-in is given."""

    lam: float = 0.9

    needs_critic: ClassVar[bool] = True
    needs_entropies: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        assert scores.entropies is not None and scores.values is not None
        sure = (scores.entropies < 1) & (batch.rollout_logprobs > -1) & (batch.token_ids % 2 == 0)
        lams = torch.where(batch.groups % 2 == 0, self.lam, 1.0).double()
        return td_targets(batch, scores, token_rewards, opens & ~sure, gamma=1.0, lam=lams, value_lam=1.0)


@dataclass(frozen=True)
class Broken:
    """Answers with whatever is asked of it, except when the configuration tries it."""

    how: str = "not finite"

    needs_critic: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        if int(batch.groups.max()) == 2:  # three groups; the runs of these tests have two
            return td_targets(batch, scores, token_rewards, opens, gamma=1.0, lam=1.0, value_lam=1.0)
        if self.how == "field":
            token_rewards = batch.lenghts * token_rewards  # type: ignore[attr-defined]
        flat = torch.zeros(batch.num_tokens - (self.how == "shape"))
        advantages = flat / 0 if self.how == "not finite" else flat
        return Targets(advantages=advantages, returns=None if self.how == "returns" else flat)


@dataclass(frozen=True)
class Unsaid:
    """Does not say whether it needs a critic."""

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        raise NotImplementedError


@dataclass(frozen=True)
class Uncallable:
    needs_critic: ClassVar[bool] = True
