"""Where V(s_t) comes from. A new value source is one class here and one line in `VALUE_SOURCES` at the end.

By the identity of SAE, the value inside a segment changes that token's own baseline alone: returns are bootstrapped only
where a segment opens. A costly source therefore measures values at these few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_rl.algo.ragged import check_groups, check_tokens, check_type, group_sums, response_draws, response_sums
from sae_rl.algo.segmentation import checked_opens
from sae_rl.knobs import Knobs, choice, flag, integer
from sae_rl.plugins import named
from sae_rl.types import Batch, Scores

NO_LIMIT = 2**62  # tokens
ENGINES_FREE = (
    "continuations need engines that wait while a step's values are measured; use schedule=synchronous, no replay"
)


class Continuations(Protocol):
    """Responses of the current policy that continue those of a batch."""

    def __call__(self, at: Tensor, k: int, max_tokens: int) -> Tensor:
        """Samples k continuations from each place, and checks them as all responses are checked.

        Args:
            at: (P,) int64 indices into the flat (N,) tensors, the most important first. A place is the state s_t before its
                token is read, and its token opens a segment.
            max_tokens: tokens that all continuations together may sample. A place that may not fit waits for those under
                way, which may need less than their most. If it still may not fit, it and all later ones are left out.

        Returns:
            (P, k) float64 returns; NaN at places that are left out, and where a check failed.

        Raises:
            ValueError: a place is outside of the batch, is named twice, or opens no segment.
        """
        ...


def check_places(at: Tensor, opens: Tensor) -> None:
    """Raises ValueError unless ``at`` are places as `Continuations` takes them; ``opens`` (N,) are a batch's segments."""
    check_type("places", at, Tensor)
    if at.dtype != torch.int64 or at.ndim != 1:
        raise ValueError(f"places are {at.dtype} of shape {tuple(at.shape)}, allowed: int64 of shape (P,)")
    outside = at[(at < 0) | (at >= opens.numel())]
    if outside.numel():
        raise ValueError(f"place {int(outside[0])} is outside of the batch, which has tokens 0 to {opens.numel() - 1}")
    inside = at[opens[at] == 0]
    if inside.numel():
        raise ValueError(f"place {int(inside[0])} opens no segment; values are measured where opens is above 0")
    if at.unique().numel() < at.numel():
        raise ValueError(f"{at.numel() - at.unique().numel()} of {at.numel()} places are named twice")


@runtime_checkable
class ValueSource(Protocol):
    """(batch, scores, token_rewards (N,), opens (N,), continuations) -> V(s_t) (N,), each before token t is read.

    ``needs_critic`` says whether a critic is trained, so that ``scores.values`` holds its values.
    """

    @property
    def needs_critic(self) -> bool: ...

    def __call__(
        self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor, continuations: Continuations
    ) -> Tensor: ...


def with_values(
    source: ValueSource,
    batch: Batch,
    scores: Scores,
    token_rewards: Tensor,
    opens: Tensor,
    continuations: Continuations,
) -> Scores:
    """``scores`` with the values of the source, which estimators read.

    Raises:
        ValueError: an argument has another type, shape or range; or the source returns another shape, or a number that is not
            finite. A user's source is named with its file and line.
    """
    check_type("batch", batch, Batch)
    check_type("scores", scores, Scores)
    check_tokens("token_rewards", token_rewards, batch)
    checked_opens("opens", opens, batch)
    if not callable(source):
        raise ValueError(f"value source is {source!r}, allowed: a ValueSource")
    with named(source):
        values = source(batch, scores, token_rewards, opens, continuations)
        check_tokens(f"the result of {type(source).__name__}", values, batch)
    return scores if values is scores.values else replace(scores, values=values)


@dataclass(frozen=True, slots=True)
class CriticValues(Knobs, ValueSource):
    """The critic's values, as in PPO."""

    needs_critic: ClassVar[bool] = True

    def __call__(
        self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor, continuations: Continuations
    ) -> Tensor:
        return _of_critic(scores)


@dataclass(frozen=True, slots=True)
class Ensemble(CriticValues):
    """The mean of several critics; each response of a batch teaches one of them, so that they differ.

    Mini-critics on disjoint responses are those of AsyPPO (arXiv 2510.01656). ``scores.value_spread`` has their standard
    deviation. All begin as the same critic.
    """

    num_critics: int = integer(2, low=1)


@dataclass(frozen=True, slots=True)
class GroupMean(Knobs, ValueSource):
    """The mean return of the group, the responses to the same prompt, at each of their tokens.

    With ``lambda_t = 1`` the advantages are those of Dr. GRPO (arXiv 2503.20783); with ``leave_one_out``, which takes the
    mean of the group's other responses, those of RLOO (arXiv 2402.14740). With a lambda below 1 they decay from the end of
    the response towards its beginning. A return is the sum of a response's token rewards.
    """

    leave_one_out: bool = flag(False)

    needs_critic: ClassVar[bool] = False
    compares_groups: ClassVar[bool] = True

    def __call__(
        self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor, continuations: Continuations
    ) -> Tensor:
        means = _group_means(batch, token_rewards, leave_one_out=self.leave_one_out)
        return means.to(token_rewards.dtype).repeat_interleave(batch.lengths)


@dataclass(frozen=True, slots=True)
class PrefixTree(Knobs, ValueSource):
    """The mean return of the group's responses that share the prefix, the response itself included.

    The nodes of TEMPO's tree (arXiv 2509.18314): V(s_t) is the mean over the leaves below s_t. Where a response has left all
    others, V is its own return, so that its later tokens have advantage 0. `rollout.first_responses` makes responses branch.
    """

    needs_critic: ClassVar[bool] = False
    compares_groups: ClassVar[bool] = True

    def __call__(
        self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor, continuations: Continuations
    ) -> Tensor:
        totals = response_sums(token_rewards.double(), batch.lengths).numpy()
        token_ids, bounds = batch.token_ids.numpy(), batch.offsets.tolist()
        responses = [token_ids[start:end] for start, end in pairwise(bounds)]
        values = np.empty(batch.num_tokens)
        for group in batch.groups.unique():
            members = (batch.groups == group).nonzero().flatten().tolist()
            for i in members:
                shared = np.array([_common(responses[i], responses[j]) for j in members])
                order = np.argsort(-shared, kind="stable")  # those that go along the farthest come first
                means = totals[members][order].cumsum() / np.arange(1, len(members) + 1)
                along = np.searchsorted(-shared[order], -np.arange(responses[i].size), side="right")
                values[bounds[i] : bounds[i + 1]] = means[along - 1]
        return torch.from_numpy(values).to(token_rewards.dtype)


Order = Literal["random", "variance", "disagreement"]
Elsewhere = Literal["critic", "held"]


@dataclass(frozen=True, slots=True)
class MonteCarloValues(Knobs, ValueSource):
    """The mean return of k continuations where segments open, within a budget of tokens for a step.

    VinePPO (arXiv 2410.01679) and SPO-chain (arXiv 2505.23564) measure values so. Places are measured in random order, or
    with ``order=variance`` first where the return varies most by the critic, V (1 - V), for rewards 0 and 1, or with
    ``order=disagreement`` first where the ``num_critics`` critics of an ensemble differ most.

    Other tokens have the critic's value, or with ``elsewhere=held`` the value of the last place before them that was
    measured. A line between two measured places would be biased: the later one depends on the tokens between them. First
    tokens are not measured, since nothing is bootstrapped there: their value is the critic's, or, held, the mean return of
    the group's other responses.
    """

    budget_tokens: int | None = integer(
        low=0, optional=True
    )  # tokens that a step's continuations sample; None: no limit
    k: int = integer(4, low=1)
    order: Order = choice("random", allowed=get_args(Order))
    elsewhere: Elsewhere = choice("critic", allowed=get_args(Elsewhere))
    num_critics: int = integer(1, low=1)  # as of `Ensemble`

    @property
    def needs_critic(self) -> bool:
        return self.elsewhere == "critic" or self.order != "random"

    @property
    def compares_groups(self) -> bool:
        return self.elsewhere == "held"

    def check_together(self) -> None:
        if self.num_critics > 1 and not self.needs_critic:
            raise ValueError(
                f"num_critics = {self.num_critics}, but elsewhere = held and order = random need no critic"
            )
        if self.order == "disagreement" and self.num_critics < 2:
            raise ValueError("order = disagreement compares critics: set num_critics to at least 2")

    def __call__(
        self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor, continuations: Continuations
    ) -> Tensor:
        is_first = torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, batch.offsets[:-1], True)
        at = ((opens > 0) & ~is_first).nonzero().flatten()
        if self.budget_tokens != 0 and at.numel():
            at = at[response_draws(batch)[at].argsort()]  # also where priorities are equal, as those of a new critic
            if self.order != "random":
                at = at[_priorities(self.order, batch, scores)[at].argsort(descending=True, stable=True)]
            budget = NO_LIMIT if self.budget_tokens is None else self.budget_tokens
            found = continuations(at, self.k, budget).nanmean(1)
            at, found = at[~found.isnan()], found[~found.isnan()]
        else:
            at, found = at[:0], torch.zeros(0, dtype=torch.float64)
        if self.elsewhere == "critic":
            values = _of_critic(scores)
            return values.index_copy(0, at, found.to(values.dtype)) if at.numel() else values
        starts = _group_means(batch, token_rewards, leave_one_out=True)
        known = is_first.index_fill(0, at, True)
        values = torch.zeros(batch.num_tokens, dtype=torch.float64).index_copy(0, batch.offsets[:-1], starts)
        values = values.index_copy(0, at, found)
        held: Tensor = torch.where(known, torch.arange(batch.num_tokens), 0).cummax(0).values
        return values.index_select(0, held).to(token_rewards.dtype)


def _of_critic(scores: Scores) -> Tensor:
    if scores.values is None:
        raise ValueError("scores.values is None, but this value source reads a critic: train one, or choose group_mean")
    return scores.values


def _priorities(order: Order, batch: Batch, scores: Scores) -> Tensor:
    """(N,) how much a measured value at each token is wanted."""
    if order == "disagreement":
        if scores.value_spread is None:
            raise ValueError(
                "scores.value_spread is None, but order = disagreement compares the critics of an ensemble"
            )
        return scores.value_spread
    values = _of_critic(scores).double().clamp(0, 1)
    return values * (1 - values)


def _group_means(batch: Batch, token_rewards: Tensor, *, leave_one_out: bool) -> Tensor:
    """(B,) float64, the mean return of each response's group, or of its other responses.

    Raises:
        ValueError: a group has one response, which has no others.
    """
    totals = response_sums(token_rewards.double(), batch.lengths)
    sums, sizes = group_sums(totals, batch.groups)
    if not leave_one_out:
        return sums / sizes
    check_groups(sizes, batch.groups, "a value that leaves its own response out")
    return (sums - totals) / (sizes - 1)


def _common(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """Tokens of the longest common prefix."""
    shorter = min(a.size, b.size)
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


VALUE_SOURCES: dict[str, type[ValueSource]] = {
    "critic": CriticValues,
    "ensemble": Ensemble,
    "group_mean": GroupMean,
    "prefix_tree": PrefixTree,
    "monte_carlo": MonteCarloValues,
}
