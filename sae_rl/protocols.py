"""What the driver needs from workers and records. `sae_rl.workers` and `sae_rl.records` implement it; so do tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from sae_rl.digests import Digests
from sae_rl.rewards.pool import Rewards
from sae_rl.types import Batch, Prompt, Rollout, Sampling, Scores, StepRecord, Targets

Metrics = dict[str, float]


class Groups(Iterator[list[Rollout]], Protocol):
    """Pending groups. Iteration yields each as soon as it is finished, in any order, and ends when none is pending."""

    def add(self, prompts: Sequence[Prompt], seed_name: str) -> None:
        """Adds a group for each prompt. Seeds derive from (run seed, ``seed_name``, prompt id, sample) and nothing else.

        The limit of ``sampling`` is that of the whole response, the prompt's ``response_prefix`` included.
        """
        ...


class RolloutEngines(Protocol):
    """All rollout engines of a run."""

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed_name: str
    ) -> Iterator[list[Rollout]]:
        """Samples ``group_size`` responses to each prompt, and yields each group as soon as it is finished, in any order.

        A response depends neither on what else is sampled at the same time nor on the engine that samples it.

        Raises:
            RuntimeError: no engine is left, a response was sampled from other weights than its engine was sent, or
                `interrupt` was called.
        """
        ...

    def open(self, *, group_size: int, sampling: Sampling) -> Groups:
        """Like `generate`, for groups that are added over time, such as those of several steps."""
        ...

    def interrupt(self) -> None:
        """Makes sampling raise RuntimeError from now on, also in another thread that waits for responses."""
        ...


class Workers(Protocol):
    """The rollout engines, the policy, the critic and the reference model of one run."""

    @property
    def rollout(self) -> RolloutEngines: ...

    @property
    def num_gpus(self) -> int:
        """GPUs that the workers hold; 0 on CPUs."""
        ...

    def score(self, batch: Batch) -> Scores:
        """V(s_t), log pi_old and log pi_ref of every response token, each only if something reads it before the update."""
        ...

    def score_all(self, batch: Batch) -> Scores:
        """What every learner computes from a batch, also where `score` leaves it out."""
        ...

    def policy_gradients(self, batch: Batch, advantages: Tensor, *, dimension: int, seed: int) -> Tensor:
        """``sum_t A_t grad log pi(a_t | s_t)`` over all tokens of a batch, without an update.

        Args:
            advantages: (E, N), those of E estimators.
            dimension: D, the numbers that each gradient is projected to. Inner products keep their expectation. With at
                least the number of the policy's parameters nothing is projected, and D is that number.

        Returns:
            (E, D) float32.
        """
        ...

    def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> tuple[Metrics, Tensor]:
        """PPO epochs of policy and critic.

        Returns:
            Metrics, and the trainer's log pi_old (N,). With ``old_logprobs: rollout`` it is known for the first mini-batch
            only, and NaN elsewhere.
        """
        ...

    def update_critic(
        self, batch: Batch, scores: Scores, targets: Targets, *, responses_per_update: int, seed: int
    ) -> Metrics:
        """One pass of the critic alone over a batch."""
        ...

    def score_critic(self, batch: Batch) -> Scores:
        """Values alone."""
        ...

    def set_critic_lr(self, lr: float | None) -> None:
        """A constant learning rate for pre-training, or None: the configured schedule from its beginning."""
        ...

    def sync_weights(self, version: int) -> Metrics:
        """Sends the policy's weights to every rollout engine and compares logprobs of both sides on probe prompts."""
        ...

    def save(self, folder: Path) -> Digests:
        """Writes weights, optimizers and schedules of policy and critic, and the policy as a Hugging Face folder.

        Returns:
            All files, by their absolute paths.
        """
        ...

    def load(self, folder: Path) -> None: ...

    def save_critic(self, folder: Path) -> None: ...

    def load_critic(self, folder: Path) -> None: ...

    def export_critic(self, folder: Path) -> None:
        """Writes the critic as a Hugging Face folder, which a run with any number of ranks can start from."""
        ...


class Recorder(Protocol):
    """Where a run's metrics and responses go. Training never reads them back."""

    def note(self, text: str) -> None:
        """Prints a line for the user."""
        ...

    def log(
        self, step: int, metrics: Metrics, phase: Literal["train", "pretraining", "evaluation"] = "train"
    ) -> None: ...

    def rollouts(self, record: StepRecord) -> None:
        """Records one step's responses, and what was computed from them."""
        ...

    def samples(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards, opens: Sequence[Tensor] | None) -> None:
        """Records the responses of an evaluation after ``step`` steps; ``opens`` (T,) for each, None: not computed."""
        ...
