"""The numbers of an evaluation, for each data set and for all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_rl.algo.stats import segment_stats
from sae_rl.evaluation.statistics import NO_ANSWER, Estimate, estimates, majority, pass_at, powers_up_to, quantile
from sae_rl.rewards.pool import Rewards
from sae_rl.rewards.verdict import Failed
from sae_rl.types import Batch, Rollout

Rows = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of one data set, or of all; intervals come from resampled prompts."""

    num_prompts: int
    samples_per_prompt: int  # n
    success: Estimate  # avg@n, the mean score
    pass_at: Mapping[int, Estimate]  # by k, up to n
    maj_at_n: Estimate | None  # None: no response has an answer
    truncated: Estimate  # fraction of responses
    failed: Estimate  # fraction of checks, which scored rewards.failed_score
    answered: Estimate  # fraction of responses in which the verifier found an answer
    response_tokens: Estimate
    right_tokens: Estimate  # over responses that pass
    wrong_tokens: Estimate  # over the other responses
    response_tokens_p50: float
    response_tokens_p95: float
    response_tokens_max: float
    segments: Mapping[str, float] | None  # see `segment_stats`; None: unknown, see `cut`

    def metrics(self) -> dict[str, float]:
        """By the part of the metric's name after ``evaluation/``, or after the name of the data set."""
        n = self.samples_per_prompt
        found: dict[str, float] = {}
        headline = {"success": self.success, "pass_at_n": self.pass_at[n], "maj_at_n": self.maj_at_n}
        for name, estimate in headline.items():
            if estimate is not None:
                found |= {f"{name}_mean": estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        found |= {
            "num_prompts": float(self.num_prompts),
            "samples_per_prompt": float(n),
            "response_tokens_mean": self.response_tokens.value,
            "response_tokens_p50": self.response_tokens_p50,
            "response_tokens_p95": self.response_tokens_p95,
            "response_tokens_max": self.response_tokens_max,
            "right_tokens_mean": self.right_tokens.value,
            "wrong_tokens_mean": self.wrong_tokens.value,
            "truncated_fraction": self.truncated.value,
            "failed_fraction": self.failed.value,
            "answered_fraction": self.answered.value,
        }
        if self.segments is not None:
            found |= {
                "segments_per_response_mean": self.segments["per_response_mean"],
                "segment_tokens_mean": self.segments["tokens_mean"],
                "opens_fraction": self.segments["opens_fraction"],
            }
        return found


def numbered(answers: Sequence[str | None]) -> list[int]:
    """Equal answers get equal numbers, from 0; no answer gets `NO_ANSWER`."""
    numbers: dict[str, int] = {}
    return [NO_ANSWER if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]


def summarize(
    rollouts: Sequence[Rollout], rewards: Rewards, n: int, pass_score: float, opens: Sequence[Tensor] | None
) -> tuple[Summary, dict[str, Summary]]:
    """The summary of all prompts together, each counted alike, and those of the data sets, in their order.

    maj@n of all prompts is over the data sets that have answers.

    Args:
        rollouts: n of each of P prompts, prompt after prompt.
        opens: (T,) for each response; None: segments are unknown.
    """
    data_sets = np.array([rollout.prompt.task for rollout in rollouts[::n]])
    member = {str(name): data_sets == name for name in dict.fromkeys(data_sets)}
    scores = np.array(rewards.scores, dtype=float).reshape(-1, n)
    failed = np.array([isinstance(outcome, Failed) for outcome in rewards.outcomes]).reshape(-1, n)
    truncated = np.array([rollout.finish_reason == "length" for rollout in rollouts]).reshape(-1, n)
    lengths = np.array([rollout.token_ids.numel() for rollout in rollouts]).reshape(-1, n)
    texts = rewards.answers
    answers = np.array([numbered(texts[i : i + n]) for i in range(0, len(texts), n)])
    right, answered = scores >= pass_score, answers != NO_ANSWER
    every = np.ones(len(right), dtype=bool)
    votes = np.any([rows & answered[rows].any() for rows in member.values()], axis=0)
    ratios = {f"pass@{k}": (pass_at(right.sum(axis=1), n, k), every) for k in powers_up_to(n)} | {
        "success": (scores.mean(axis=1), every),
        "maj_at_n": (majority(answers, scores) * votes, votes),
        "truncated": (truncated.mean(axis=1), every),
        "failed": (failed.mean(axis=1), every),
        "answered": (answered.mean(axis=1), every),
        "response_tokens": (lengths.mean(axis=1), every),
        "right_tokens": ((lengths * right).sum(axis=1), right.sum(axis=1)),
        "wrong_tokens": ((lengths * ~right).sum(axis=1), (~right).sum(axis=1)),
    }
    columns = [np.stack([pair[side] for pair in ratios.values()], axis=1).astype(float) for side in (0, 1)]

    def summary_of(rows: Rows) -> Summary:
        found = dict(zip(ratios, estimates(columns[0][rows], columns[1][rows]), strict=True))
        maj_at_n = found.pop("maj_at_n")
        return Summary(
            num_prompts=int(rows.sum()),
            samples_per_prompt=n,
            pass_at={k: found.pop(f"pass@{k}") for k in powers_up_to(n)},
            maj_at_n=maj_at_n if votes[rows].any() else None,
            response_tokens_p50=quantile(lengths[rows], 0.5),
            response_tokens_p95=quantile(lengths[rows], 0.95),
            response_tokens_max=float(lengths[rows].max()),
            segments=None if opens is None else _segment_summary(rollouts, opens, rows.repeat(n)),
            **found,
        )

    return summary_of(every), {name: summary_of(rows) for name, rows in member.items()}


def _segment_summary(rollouts: Sequence[Rollout], opens: Sequence[Tensor], chosen: Rows) -> dict[str, float]:
    """The segments of the chosen responses."""
    indices = np.flatnonzero(chosen)
    batch = Batch.of([rollouts[i] for i in indices], [0.0] * len(indices))
    stats = segment_stats(batch, torch.cat([opens[i] for i in indices]))
    return {name: stats[f"segment/{name}"] for name in ("per_response_mean", "tokens_mean", "opens_fraction")}
