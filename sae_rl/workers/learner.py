"""What the policy, critic and reference workers share: one data-parallel rank of a network in a DeepSpeed engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sae_rl.algo.losses import LossSum
from sae_rl.backends.deepspeed import Learner, Rank, join_group
from sae_rl.backends.packing import MicroBatch, draw_mini_batches
from sae_rl.backends.sequence_parallel import SequenceGroup
from sae_rl.config.schema import LearnerConfig, ModelConfig
from sae_rl.digests import Digests, digests_of
from sae_rl.garbage import collect_as_usual
from sae_rl.types import Batch
from sae_rl.workers.group import Process
from sae_rl.workers.shared_folder import answer_nonce


class LearnerWorker(Process):
    """One data-parallel rank. Every method is a collective: all ranks of the role are called with the same arguments."""

    def _start(
        self,
        rank: Rank,
        model: ModelConfig,
        config: LearnerConfig,
        build: Callable[[SequenceGroup | None], nn.Module],
        num_steps: int | None,
    ) -> None:
        """Joins the process group and loads the network. ``num_steps`` None: the network is never trained."""
        join_group(rank)
        self._model, self._config = model, config
        self._learner = Learner(build, model, config, rank, num_steps=num_steps)
        self._learner.release_memory()
        collect_as_usual()

    def _train(
        self,
        batch: Batch,
        loss: Callable[[MicroBatch], LossSum],
        total: Callable[[Tensor], float],
        num_epochs: int,
        num_mini_batches: int,
        seed: int,
    ) -> list[dict[str, float]]:
        """Passes over a batch with an optimizer update for each mini-batch.

        Args:
            loss: the sum of the loss over a micro-batch.
            total: rows (b,) of a mini-batch -> the number that its sum is divided by.

        Returns:
            For each update, sums over this rank's tokens.
        """
        with self._at_work():
            return [
                self._learner.update(batch, rows, loss, total(rows))
                for epoch in range(num_epochs)
                for rows in draw_mini_batches(batch.num_responses, num_mini_batches, seed + epoch)
            ]

    def _score(
        self, batch: Batch, forward: Callable[[MicroBatch], dict[str, Tensor]], threads: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Token indices and results of this rank, as `Learner.score` returns them; the GPU's cache is empty afterwards."""
        with self._more_threads(threads), self._at_work():
            return self._learner.score(batch, forward)

    @contextmanager
    def _more_threads(self, threads: int) -> Iterator[None]:
        """Around work while other processes wait."""
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))
        try:
            yield
        finally:
            torch.set_num_threads(self._learner.rank.threads)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Around a phase that needs memory: other learners or an engine may have the GPU next, and find it empty."""
        try:
            yield
        finally:
            self._learner.release_memory()

    def answer_nonce(self, nonce: Path) -> str | None:
        """Shows the driver whether this process and the driver see the same storage."""
        return answer_nonce(nonce)

    def all_reduce(self) -> int:
        """The number of ranks, as their process group counts them."""
        one = torch.ones((), device=self._learner.device)
        torch.distributed.all_reduce(one)
        return int(one)

    def save(self, folder: Path) -> Digests:
        """Writes weights, optimizer, schedule and random states. Returns this rank's files."""
        with self._at_work():
            return digests_of(self._learner.save(folder))

    def load(self, folder: Path) -> None:
        with self._at_work():
            self._learner.load(folder)

    def export(self, folder: Path) -> Digests:
        """Writes a Hugging Face folder: all ranks gather the weights, rank 0 writes. Returns this rank's files."""
        weights = self._learner.full_weights()
        with self._at_work():
            if self._learner.rank.index == 0:
                self._learner.network.export(weights, self._model.path, folder)
                return digests_of(file for file in folder.rglob("*") if file.is_file())
            for _ in weights:
                pass
            return {}

    def close(self) -> None:
        self._learner.close()
