"""Every value that crosses a stage of the training loop.

Shape legend, used in comments and docstrings everywhere:

    B   responses in a batch (prompts x group size)
    T   tokens of one response
    N   response tokens of the whole batch, N = sum of all T
    M   prompt tokens of the whole batch

Batches are ragged: one flat tensor of N tokens and ``offsets`` (B+1,), so that response ``i`` is
``flat[offsets[i]:offsets[i + 1]]``. Nothing is padded until a library demands it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem: the text that the model reads, and the answer that the verifier compares its response with."""

    id: str  # unique within its data set; the seeds of its responses derive from it
    text: str
    token_ids: tuple[int, ...]
    answer: str  # ground truth, in the form that the verifier reads
    task: str  # the data set it comes from; evaluation metrics are split by it
    reward: str  # name of the verifier in `sae_rl.rewards.table`, or an import path
    # Tokens that begin every response to it: a rollout holds the tokens after them, and its text is the whole response.
    response_prefix: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters, in vLLM's terms. Training changes only the temperature: see `Rollout`."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def changes(self) -> list[tuple[str, float, float]]:
        """Parameters besides the temperature that change the policy's distribution: (name, value, neutral value)."""
        plain = Sampling(max_tokens=self.max_tokens, temperature=self.temperature)
        found = [(f.name, getattr(self, f.name), getattr(plain, f.name)) for f in fields(self)]
        return [(name, value, neutral) for name, value, neutral in found if value != neutral]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response, as the rollout engine returned it."""

    prompt: Prompt
    sample: int  # 0 .. group_size-1 within the prompt's group
    token_ids: Tensor  # (T,) int32
    rollout_logprobs: Tensor  # (T,) float32, log pi_rollout(a_t | s_t) at `temperature`, untruncated
    text: str
    finish_reason: FinishReason  # "length": cut at the limit, the end token was not sampled
    policy_versions: Tensor  # (T,) int32, the step whose weights sampled each token
    temperature: float
    action_mask: Tensor | None = None  # (T,) bool, see `Batch.action_mask`

    def __post_init__(self) -> None:
        per_token = {
            "logprobs": self.rollout_logprobs,
            "policy versions": self.policy_versions,
            "entries of action_mask": self.action_mask,
        }
        for name, flat in per_token.items():
            if flat is not None and flat.shape != self.token_ids.shape:
                raise ValueError(
                    f"rollout of prompt {self.prompt.id!r}: {tuple(self.token_ids.shape)} token ids but "
                    f"{tuple(flat.shape)} {name}"
                )

    @property
    def dense_action_mask(self) -> Tensor:
        """(T,) bool, ``action_mask`` with None as all True."""
        return torch.ones_like(self.token_ids, dtype=torch.bool) if self.action_mask is None else self.action_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rollouts of one step, flat and with their rewards."""

    prompt_token_ids: Tensor  # (M,) int32
    prompt_offsets: Tensor  # (B+1,) int64
    token_ids: Tensor  # (N,) int32, responses only
    offsets: Tensor  # (B+1,) int64
    rollout_logprobs: Tensor  # (N,) float32
    policy_versions: Tensor  # (N,) int32
    rewards: Tensor  # (B,) float32, R(x, y) of the whole response
    groups: Tensor  # (B,) int64, responses to the same prompt share a number
    truncated: Tensor  # (B,) bool, cut at the length limit
    temperature: float  # at which the policy sampled
    # (N,) bool; False: the policy did not sample the token, as in a tool's output. The networks read such a token, but it
    # has no advantage and no loss, and its logprobs and values are 0. None: the policy sampled all tokens.
    action_mask: Tensor | None = None
    # (N,) bool, for segmenters, which get sampled tokens only: the policy did not sample the token before. None: it did.
    turn_starts: Tensor | None = None

    @staticmethod
    def of(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> Batch:
        """Concatenates rollouts; ``rewards`` has one number per rollout.

        Raises:
            ValueError: no rollouts, a response without a sampled token, or another number of rewards than rollouts.
        """
        if not rollouts:
            raise ValueError("a batch needs at least one rollout, found none")
        if len(rewards) != len(rollouts):
            raise ValueError(f"{len(rollouts)} rollouts but {len(rewards)} rewards")
        for rollout in rollouts:
            if rollout.token_ids.numel() == 0:
                raise ValueError(f"rollout {rollout.sample} of prompt {rollout.prompt.id!r} is empty")
            if rollout.action_mask is not None and not bool(rollout.action_mask.any()):
                raise ValueError(f"rollout {rollout.sample} of prompt {rollout.prompt.id!r} has no sampled token")
        has_mask = any(r.action_mask is not None for r in rollouts)
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(r.prompt.id, len(numbers)) for r in rollouts]
        temperatures = {r.temperature for r in rollouts}
        if len(temperatures) != 1:
            raise ValueError(f"rollouts of one batch need one temperature, found {sorted(temperatures)}")
        return Batch(
            prompt_token_ids=torch.tensor([t for r in rollouts for t in r.prompt.token_ids], dtype=torch.int32),
            prompt_offsets=offsets_of([len(r.prompt.token_ids) for r in rollouts]),
            token_ids=torch.cat([r.token_ids for r in rollouts]).int(),  # half of what learners are sent
            offsets=offsets_of([r.token_ids.numel() for r in rollouts]),
            rollout_logprobs=torch.cat([r.rollout_logprobs for r in rollouts]),
            policy_versions=torch.cat([r.policy_versions for r in rollouts]).int(),
            rewards=torch.tensor(rewards, dtype=torch.float32),
            groups=torch.tensor(groups, dtype=torch.int64),
            truncated=torch.tensor([r.finish_reason == "length" for r in rollouts]),
            temperature=temperatures.pop(),
            action_mask=torch.cat([r.dense_action_mask for r in rollouts]) if has_mask else None,
        )

    @property
    def num_responses(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.token_ids.numel()

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each response."""
        return self.offsets.diff()

    @property
    def num_sampled(self) -> Tensor:
        """(B,) sampled tokens of each response."""
        if self.action_mask is None:
            return self.lengths
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.action_mask.cumsum(0)])[self.offsets]
        return before.diff()

    @property
    def last_sampled(self) -> Tensor:
        """(B,) index into the flat tensors of each response's last sampled token."""
        if self.action_mask is None:
            return self.offsets[1:] - 1
        return self.action_mask.nonzero().flatten()[self.num_sampled.cumsum(0) - 1]

    @property
    def prompt_lengths(self) -> Tensor:
        """(B,) tokens of each prompt."""
        return self.prompt_offsets.diff()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the networks compute from a batch before its update."""

    # (N,) log pi_theta_old(a_t | s_t), the denominator of the PPO ratio; None: the update's own pass computes them
    old_logprobs: Tensor | None
    values: Tensor | None  # (N,) V(s_t), computed before token t is read; None: the estimator needs no critic
    ref_logprobs: Tensor | None  # (N,) log pi_ref(a_t | s_t); None: no KL term reads it
    entropies: Tensor | None = None  # (N,) entropy of pi_theta_old(. | s_t); None: nothing reads it
    final_values: Tensor | None = None  # (B,) V after the last token; None: V is 0 there
    value_spread: Tensor | None = None  # (N,) standard deviation of V over the critics of an ensemble; None: one critic


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What an estimator computes from rewards, values and segments."""

    advantages: Tensor  # (N,)
    returns: Tensor | None  # (N,) the critic's targets; None: the estimator needs no critic


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One training step as it is recorded: the responses that it trained on, and what was computed from them."""

    step: int
    rollouts: Sequence[Rollout]  # B
    rewards: Sequence[float]  # B
    reasons: Sequence[str]  # B, what the verifier said of each response
    opens: Tensor  # (N,)
    scores: Scores
    targets: Targets  # before whitening
    monte_carlo_returns: Tensor | None = None  # (N,), NaN where they are not known; None: there is no critic
    critic_values: Tensor | None = None  # (N,); None: there is no critic, or ``scores.values`` are its values


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """(B,) lengths -> (B+1,) offsets, ``[0, l_0, l_0 + l_1, ...]``."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def gather_ragged(flat: Tensor, offsets: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` (K,) of a ragged tensor, concatenated in that order."""
    starts, ends = offsets[indices].tolist(), offsets[indices + 1].tolist()
    pieces = [flat[a:b] for a, b in zip(starts, ends, strict=True)]
    return torch.cat(pieces) if pieces else flat[:0]


def select(batch: Batch, indices: Tensor) -> Batch:
    """The responses ``indices`` (K,) of a batch, in that order."""
    return replace(
        batch,
        prompt_token_ids=gather_ragged(batch.prompt_token_ids, batch.prompt_offsets, indices),
        prompt_offsets=offsets_of(batch.prompt_lengths[indices].tolist()),
        token_ids=gather_ragged(batch.token_ids, batch.offsets, indices),
        offsets=offsets_of(batch.lengths[indices].tolist()),
        rollout_logprobs=gather_ragged(batch.rollout_logprobs, batch.offsets, indices),
        policy_versions=gather_ragged(batch.policy_versions, batch.offsets, indices),
        rewards=batch.rewards[indices],
        action_mask=None if batch.action_mask is None else gather_ragged(batch.action_mask, batch.offsets, indices),
        turn_starts=None if batch.turn_starts is None else gather_ragged(batch.turn_starts, batch.offsets, indices),
        groups=batch.groups[indices],
        truncated=batch.truncated[indices],
    )


def sampled_only(batch: Batch, scores: Scores) -> tuple[Batch, Scores]:
    """Removes the tokens that the policy did not sample."""
    action_mask = batch.action_mask
    if action_mask is None:
        return batch, scores

    def kept(flat: Tensor | None) -> Tensor | None:
        return None if flat is None else flat[action_mask]

    return replace(
        batch,
        token_ids=batch.token_ids[action_mask],
        offsets=offsets_of(batch.num_sampled.tolist()),
        rollout_logprobs=batch.rollout_logprobs[action_mask],
        policy_versions=batch.policy_versions[action_mask],
        action_mask=None,
        turn_starts=~action_mask.roll(1)[action_mask],
    ), replace(
        scores,
        old_logprobs=kept(scores.old_logprobs),
        values=kept(scores.values),
        ref_logprobs=kept(scores.ref_logprobs),
        entropies=kept(scores.entropies),
        value_spread=kept(scores.value_spread),
    )
