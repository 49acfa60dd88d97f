"""The policy: its logprobs, its PPO updates, and its weights on their way to the rollout engines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ray.actor import ActorHandle
from torch import Tensor

from sae_rl.algo.losses import LossSum, PolicyLoss, PolicyTokens
from sae_rl.backends.deepspeed import Learner, Rank, join_group
from sae_rl.backends.lora import add_adapters, without_adapters
from sae_rl.backends.models import PolicyNetwork, export_causal_lm, load_causal_lm
from sae_rl.backends.packing import MicroBatch, draw_mini_batches
from sae_rl.backends.sequence_parallel import SequenceGroup
from sae_rl.config.schema import LearnerConfig, LoraConfig, ModelConfig
from sae_rl.types import Batch, Scores, Targets
from sae_rl.workers.engine_client import EngineClient
from sae_rl.workers.group import Process

if TYPE_CHECKING:
    from sae_rl.backends.weight_sender import Sender  # brings vLLM


class PolicyWorker(Process):
    """One data-parallel rank of the policy."""

    def start(
        self,
        rank: Rank,
        model: ModelConfig,
        config: LearnerConfig,
        loss: PolicyLoss,
        num_steps: int,
        lora: LoraConfig,
        with_reference: bool,
    ) -> None:
        """``with_reference``: it scores without its adapters too, and so is its own reference."""
        join_group(rank)
        self._rank = rank
        self._model = model
        self._config = config
        self._loss = loss
        self._with_reference = with_reference

        def build(group: SequenceGroup | None) -> PolicyNetwork:
            causal_lm = load_causal_lm(model, group)
            if lora.rank:
                add_adapters(causal_lm, lora)
            return PolicyNetwork(causal_lm, group, fused=model.logprobs == "cut_cross_entropy")

        self._learner = Learner(build, model, config, rank, num_steps=num_steps)
        self._sender: Sender | None = None

    def score(self, batch: Batch, with_entropies: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Which of the N tokens this rank answers for, their logprobs, and their entropies if asked for."""

        def forward(micro: MicroBatch) -> dict[str, Tensor]:
            logprobs, entropies = self._learner.engine(micro, batch.temperature, with_entropies)
            answer = (
                {"old_logprobs": logprobs} if entropies is None else {"old_logprobs": logprobs, "entropies": entropies}
            )
            if self._with_reference:
                with without_adapters(self._learner.network):
                    answer["ref_logprobs"], _ = self._learner.engine(micro, batch.temperature, False)
            return answer

        return self._learner.score(batch, forward)

    def update(self, batch: Batch, scores: Scores, targets: Targets, seed: int) -> list[dict[str, float]]:
        """All epochs and mini-batches of one step; sums over this rank's tokens for each update."""
        with_entropies = self._loss.entropy_coef > 0

        def loss(micro: MicroBatch) -> LossSum:
            logprobs, entropies = self._learner.engine(micro, batch.temperature, with_entropies)
            at, device = micro.token_index.cpu(), logprobs.device
            tokens = PolicyTokens(
                logprobs=logprobs,
                old_logprobs=scores.old_logprobs[at].to(device),
                advantages=targets.advantages[at].to(device),
                counts=micro.counts,
                ref_logprobs=None if scores.ref_logprobs is None else scores.ref_logprobs[at].to(device),
                entropies=entropies,
                rollout_logprobs=batch.rollout_logprobs[at].to(device),
                rewards=batch.rewards[micro.rows.cpu()].to(device),
            )
            return self._loss(tokens)

        updates = []
        for epoch in range(self._config.num_epochs):
            for rows in draw_mini_batches(batch.num_responses, self._config.num_mini_batches, seed + epoch):
                updates.append(self._learner.update(batch, rows, loss, self._loss.total(batch.num_sampled[rows])))
        return updates

    def open_weight_transfer(
        self,
        engines: list[ActorHandle],
        workers_per_engine: int,
        shares_gpus: bool,
        address: str,
        port: int,
        timeout_s: float,
    ) -> None:
        """Connects rank 0 with the worker processes of every engine; all ranks take part in gathering weights.

        ``shares_gpus``: with each rank, one of the engines.
        """
        from sae_rl.backends.weight_sender import Sender, trainer_init_info

        self._client = EngineClient(engines, workers_per_engine, timeout_s)
        info = trainer_init_info(
            self._rank.device,
            shares_gpus=shares_gpus,
            rank=self._rank.index,
            address=address,
            port=port,
            world_size=1 + len(engines) * workers_per_engine,
            timeout_s=timeout_s,
        )
        self._sender = Sender(info, self._client, self._learner)

    def send_weights(self, version: str) -> None:
        assert self._sender is not None, "open_weight_transfer comes first"
        self._client.version = version
        self._sender.send()

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        """Writes the policy as a Hugging Face folder; rank 0 writes, all ranks gather."""
        weights = self._learner.full_weights()
        if self._rank.index == 0:
            export_causal_lm(self._learner.network.causal_lm, weights, self._model.path, folder)
        else:
            for _ in weights:
                pass

    def close(self) -> None:
        self._learner.close()


def merge(parts: list[tuple[Tensor, dict[str, Tensor]]], batch: Batch) -> dict[str, Tensor]:
    """The ranks' scores of their own tokens -> flat (N,) tensors by name; nan where no rank answered."""
    names = [name for _, outputs in parts for name in outputs]
    merged = {name: torch.full((batch.num_tokens,), float("nan")) for name in names}
    if batch.action_mask is not None:
        for flat in merged.values():
            flat[~batch.action_mask] = 0.0
    for index, outputs in parts:
        for name, output in outputs.items():
            merged[name][index] = output
    return merged


def summarize(ranks: list[list[dict[str, float]]], role: str) -> dict[str, float]:
    """Sums per rank and update -> means over tokens, and the mean gradient norm over updates."""
    num_tokens = sum(update["tokens"] for updates in ranks for update in updates)
    names = [name for name in ranks[0][0] if "/" in name]
    metrics = {name: sum(u.get(name, 0.0) for updates in ranks for u in updates) / num_tokens for name in names}
    first = ranks[0]
    norms = [update["grad_norm"] for update in first if math.isfinite(update["grad_norm"])]
    metrics[f"{role}/grad_norm"] = sum(norms) / len(norms) if norms else math.nan
    metrics[f"{role}/skipped_updates"] = float(len(first) - len(norms))
    metrics[f"{role}/lr"] = first[-1]["lr"]
    metrics[f"{role}/num_updates"] = float(len(first))
    metrics[f"time/{role}_update_s"] = max(sum(update["seconds"] for update in updates) for updates in ranks)
    sums = {
        name: sum(u[name] for updates in ranks for u in updates) for name in ("flops", "positions", "real_positions")
    }
    seconds = metrics[f"time/{role}_update_s"]
    metrics[f"throughput/{role}_update_tflops"] = sums["flops"] / seconds / len(ranks) / 1e12
    metrics[f"throughput/{role}_padding_fraction"] = 1 - sums["real_positions"] / sums["positions"]
    metrics[f"memory/{role}_peak_gb"] = max(updates[-1]["peak_memory_gb"] for updates in ranks)
    return metrics
