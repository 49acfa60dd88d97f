"""What the driver asks of its workers. Their implementations are in `sae_rl.workers`; tests may bring others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from sae_rl.rewards.pool import Rewards
from sae_rl.types import Batch, Prompt, Rollout, Sampling, Scores, StepRecord, Targets

Metrics = dict[str, float]
Scoring = Any  # of a part of a batch, under way; the workers' own


class Groups(Protocol):
    """Groups under way; iterating gives each as soon as it is done, in any order, and ends when none is."""

    def add(self, prompts: Sequence[Prompt], seed_name: str) -> None:
        """More of them. ``seed_name`` names the random numbers."""
        ...

    def __iter__(self) -> Iterator[list[Rollout]]: ...

    def __next__(self) -> list[Rollout]: ...


class RolloutEngines(Protocol):
    """Everything that samples."""

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed_name: str
    ) -> Iterator[list[Rollout]]:
        """``group_size`` responses to each prompt, a group as soon as it is done. ``seed_name`` names the random numbers."""
        ...

    def open(self, *, group_size: int, sampling: Sampling) -> Groups:
        """The same for groups that are added one after the other, such as those of several steps."""
        ...

    def interrupt(self) -> None:
        """Whoever waits for responses in another thread gets an exception instead; nothing is sampled after it."""
        ...


class Workers(Protocol):
    """The rollout engines, the policy, the critic and the reference model of one run."""

    @property
    def rollout(self) -> RolloutEngines: ...

    @property
    def num_gpus(self) -> int:
        """That the workers hold; 0 on CPUs."""
        ...

    def start_score(self, rollouts: Sequence[Rollout]) -> Scoring:
        """Begins to score a part of a batch that is still being sampled."""
        ...

    def score(self, batch: Batch, started: Sequence[Scoring] = (), rows: Sequence[int] = ()) -> Scores:
        """V(s_t), log pi_old and log pi_ref of every response token.

        Args:
            started: parts that are scored already, or none.
            rows: which responses of those parts are the batch; none: all.
        """
        ...

    def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> Metrics:
        """PPO epochs of policy and critic."""
        ...

    def update_critic(
        self, batch: Batch, scores: Scores, targets: Targets, *, responses_per_update: int, seed: int
    ) -> Metrics:
        """One pass of the critic alone over a batch."""
        ...

    def score_critic(self, batch: Batch) -> Scores:
        """Values alone; logprobs are nan."""
        ...

    def set_critic_lr(self, lr: float | None) -> None:
        """A constant learning rate for pre-training, or None: the configured schedule from its beginning."""
        ...

    def sync_weights(self, version: int) -> Metrics:
        """Sends the policy's weights to every rollout engine and compares logprobs of both sides on probe prompts."""
        ...

    def save(self, folder: Path) -> None:
        """Weights, optimizers and schedules of policy and critic, and the policy as a Hugging Face folder."""
        ...

    def load(self, folder: Path) -> None: ...

    def save_critic(self, folder: Path) -> None: ...

    def load_critic(self, folder: Path) -> None: ...

    def export_critic(self, folder: Path) -> None:
        """The critic as a Hugging Face folder, for any number of ranks and any run."""
        ...


class Recorder(Protocol):
    """Where a run's numbers and responses go. Nothing in training reads them back."""

    def note(self, text: str) -> None:
        """A message for the reader of the console."""
        ...

    def log(
        self, step: int, metrics: Metrics, phase: Literal["train", "pretraining", "evaluation"] = "train"
    ) -> None: ...

    def rollouts(self, record: StepRecord) -> None:
        """The responses of one training step, and what was computed from them."""
        ...

    def samples(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards, opens: Sequence[Tensor] | None) -> None:
        """What an evaluation after ``step`` steps sampled; ``opens`` (T,) of each response, or None: not known."""
        ...
