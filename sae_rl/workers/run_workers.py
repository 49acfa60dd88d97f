"""All workers of one run, and what the driver asks of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from sae_rl.backends.deepspeed import Rank
from sae_rl.config.schema import Config
from sae_rl.records.clock import Clock
from sae_rl.types import Batch, Prompt, Rollout, Scores, Targets, gather_ragged, offsets_of
from sae_rl.workers.engines import Engines
from sae_rl.workers.group import Call, WorkerError, WorkerGroup, wait_for
from sae_rl.workers.placement import Role, plan
from sae_rl.workers.policy import merge, summarize
from sae_rl.workers.rollout_pool import RolloutPool

PROBE_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Scoring:
    """A part of a batch, with the learners' scores of it under way."""

    batch: Batch
    calls: list[Call]


class RunWorkers:
    """The driver's handle on all workers; implements `sae_rl.protocols.Workers`."""

    def __init__(
        self,
        config: Config,
        groups: dict[Role, WorkerGroup],
        probe_prompts: list[Prompt],
        clock: Clock,
        note: Callable[[str], None] = print,
    ) -> None:
        self._config = config
        self._groups = groups
        self._probe_prompts = probe_prompts
        self._clock = clock
        self._rollout: RolloutPool | None = None
        if "rollout" in groups:
            engines = Engines(groups["rollout"], config, self._load_engine, self._refit, note)
            self._rollout = RolloutPool(engines, config)
        self._connected: list[ActorHandle] = []  # the engines that the policy sends weights to
        # Held while the policy works: its ranks must be asked in one order, and its weights are sent when they do not change.
        self._policy = threading.Lock()
        self._version = 0  # of its weights

    def start(self) -> None:
        """Loads all models, at the same time where they do not share GPUs with engines."""
        config = self._config
        limit = config.cluster.start_timeout_s
        for group in self._groups.values():
            group.locate(limit)
        calls = []
        for role, group in self._groups.items():  # "rollout" is the first
            calls.append(group.start(self._load_engine) if role == "rollout" else self._start_learner(role))
            if config.cluster.colocate_rollout:  # one after the other, as vLLM measures what is free on its GPU
                wait_for([calls[-1]], limit)
        wait_for(calls, limit)
        if "rollout" in self._groups:
            self._groups["rollout"].locate(limit)  # again, with vLLM's own processes

    @property
    def rollout(self) -> RolloutPool:
        assert self._rollout is not None, "these workers were started without rollout engines"
        return self._rollout

    @property
    def num_gpus(self) -> int:
        """That these workers hold; 0 on CPUs."""
        total = plan(self._config, list(self._groups)).total
        return int(total["GPU"]) if "GPU" in total else 0

    def _load_engine(self, worker: ActorHandle) -> Any:
        config = self._config
        threads = config.cluster.rollout.threads_per_worker
        max_tokens = config.task.max_prompt_tokens + config.rollout.max_response_tokens
        return worker.start.remote(
            config.model,
            config.rollout,
            config.cluster.device,
            threads,
            config.cluster.colocate_rollout,
            max_tokens,
            config.seed,
        )

    def _send_and_probe(self, ranks: list[int]) -> dict[str, float]:
        self._send(ranks)
        self.rollout.engines.hold(ranks, self._version)
        return self._probe(ranks)

    def _send(self, ranks: list[int]) -> None:
        """The policy's weights to the engines of these ranks; connects with them if it has not yet."""
        policy, config = self._groups["policy"], self._config
        engines = [self._groups["rollout"].workers[rank] for rank in ranks]
        if engines != self._connected:
            self._connected = []
            ((address, port),) = policy.run_on([0], lambda worker: worker.free_address.remote())
            parallel = config.rollout.tensor_parallel_size
            shares_gpus = config.cluster.colocate_rollout
            transfer = (engines, parallel, shares_gpus, address, port, config.cluster.call_timeout_s)
            policy.run(lambda worker: worker.open_weight_transfer.remote(*transfer))
            self._connected = engines
        policy.run(lambda worker: worker.send_weights.remote(str(self._version)))

    def _refit(self, rank: int) -> None:
        """Gives a replaced engine the policy's weights, unless they are changing."""
        if not self._policy.acquire(blocking=False):
            return
        try:
            self._send_and_probe([rank])
        finally:
            self._policy.release()

    def _start_learner(self, role: Role) -> Call:
        config, group = self._config, self._groups[role]
        ((address, port),) = group.run_on([0], lambda worker: worker.free_address.remote())
        extra = {
            "policy": (
                config.learner.policy,
                config.algorithm.policy_loss,
                config.steps,
                config.learner.lora,
                config.algorithm.needs_reference and not config.needs_reference_workers,
            ),
            "critic": (
                config.learner.critic,
                config.algorithm.value_loss,
                config.steps,
                config.learner.critic_pretraining.checkpoint,
            ),
            "reference": (config.learner.policy,),
        }[role]
        references = []
        for index, worker in enumerate(group.workers):
            rank = Rank(
                index=index,
                size=len(group.workers),
                master_address=address,
                master_port=port,
                device=config.cluster.device,
                threads=getattr(config.cluster, role).threads_per_worker,
                sequence_parallel_size=config.learner.sequence_parallel_size,
            )
            references.append(worker.start.remote(rank, config.model, *extra))
        return Call(group, references)

    def start_score(self, rollouts: Sequence[Rollout]) -> Scoring:
        # Scores do not depend on rewards, which may not be there yet.
        return self._start_score_all(Batch.of(rollouts, [0.0] * len(rollouts)))

    def score(self, batch: Batch, started: Sequence[Scoring] = (), rows: Sequence[int] = ()) -> Scores:
        with self._clock.phase("score"), self._policy:
            self._have_gpus()
            return self._scores_of(batch, started or [self._start_score_all(batch)], rows if started else ())

    def _have_gpus(self) -> None:
        """Learners are about to work: engines that share their GPUs sleep."""
        if self._rollout is not None:
            self._rollout.sleep()

    def score_critic(self, batch: Batch) -> Scores:
        with self._clock.phase("score"):
            self._have_gpus()
            return self._scores_of(batch, [self._start_score(batch, ["critic"], False)])

    def _start_score_all(self, batch: Batch) -> Scoring:
        return self._start_score(batch, list(self._groups), self._config.algorithm.needs_entropies)

    def _start_score(self, batch: Batch, roles: list[Role], with_entropies: bool) -> Scoring:
        shared = ray.put(batch)
        with_final = self._config.algorithm.bootstrap_truncated
        arguments = {"policy": (shared, with_entropies), "critic": (shared, with_final), "reference": (shared,)}
        asked = [role for role in roles if role != "rollout"]
        calls = [
            self._groups[role].start(lambda worker, role=role: worker.score.remote(*arguments[role])) for role in asked
        ]
        return Scoring(batch, calls)

    def _scores_of(self, batch: Batch, parts: Sequence[Scoring], rows: Sequence[int] = ()) -> Scores:
        """``parts`` are the batch, in its order; or its responses are ``rows`` of them."""
        offsets = offsets_of([length for part in parts for length in part.batch.lengths.tolist()])
        chosen = torch.tensor(rows) if rows else torch.arange(offsets.numel() - 1)
        assert torch.equal(offsets.diff()[chosen], batch.lengths), "every token is scored, and once"
        answers = wait_for([call for part in parts for call in part.calls], self._config.cluster.call_timeout_s)
        flats: dict[str, list[Tensor]] = {}
        for part in parts:
            for ranks in (answers.pop(0) for _ in part.calls):
                for name, flat in merge(ranks, part.batch).items():
                    flats.setdefault(name, []).append(flat)
        merged = {name: torch.cat(pieces) for name, pieces in flats.items()}
        if rows:
            merged = {name: gather_ragged(flat, offsets, chosen) for name, flat in merged.items()}
        final_values = merged.get("final_values")
        return Scores(
            old_logprobs=merged.get("old_logprobs", torch.full((batch.num_tokens,), float("nan"))),
            entropies=merged.get("entropies"),
            values=merged.get("values"),
            final_values=None if final_values is None else final_values[batch.last_sampled],
            ref_logprobs=merged.get("ref_logprobs"),
        )

    def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> dict[str, float]:
        with self._clock.phase("update"), self._policy:
            self._have_gpus()
            shared = [ray.put(value) for value in (batch, scores, targets)]
            asked = self._learners()
            calls = [self._groups[role].start(lambda worker: worker.update.remote(*shared, seed)) for role in asked]
            answers = wait_for(calls, self._config.cluster.call_timeout_s)
            self._version += 1
        metrics: dict[str, float] = {}
        peak = self._config.cluster.peak_tflops
        for role, ranks in zip(asked, answers, strict=True):
            metrics |= summarize(ranks, role)
            if peak is not None:
                metrics[f"throughput/{role}_mfu"] = metrics[f"throughput/{role}_update_tflops"] / peak
        return metrics

    def update_critic(
        self, batch: Batch, scores: Scores, targets: Targets, *, responses_per_update: int, seed: int
    ) -> dict[str, float]:
        with self._clock.phase("update"):
            self._have_gpus()
            shared = [ray.put(value) for value in (batch, scores, targets)]
            ranks = self._groups["critic"].run(
                lambda worker: worker.pretrain.remote(*shared, responses_per_update, seed)
            )
        return summarize(ranks, "critic")

    def set_critic_lr(self, lr: float | None) -> None:
        self._groups["critic"].run(lambda worker: worker.set_lr.remote(lr))

    def sync_weights(self, version: int) -> dict[str, float]:
        """Sends the policy's weights to every engine, and compares both sides' logprobs on probe prompts.

        If that fails while the policy lives, the engines may be left with a part of the weights: all are replaced, and it is
        tried once more.

        Raises:
            RuntimeError: an engine's logprobs differ from the policy's by more than ``rollout.logprob_tolerance``.
        """
        engines = self.rollout.engines
        with self._clock.phase("sync"), self.rollout.lock, self._policy:
            self._version = version
            self.rollout.wake()
            try:
                probed = self._send_and_probe(engines.settle() or engines.replace_all("none had started"))
            except WorkerError as error:
                if error.died == "policy":
                    raise
                probed = self._send_and_probe(engines.replace_all(f"sending weights {version} failed ({error})"))
            return probed | {"rollout/num_lost_engines": float(engines.num_lost)}

    def _probe(self, ranks: list[int]) -> dict[str, float]:
        rollout = self._config.rollout
        sampling = rollout.sampling(min(PROBE_TOKENS, rollout.max_response_tokens))
        engines = self.rollout.generate_on(ranks, self._probe_prompts, sampling)
        sampled = [r for engine in engines for r in engine]
        batch = Batch.of(sampled, [0.0] * len(sampled))
        scores = self._scores_of(batch, [self._start_score(batch, ["policy"], False)])
        difference = (batch.rollout_logprobs - scores.old_logprobs).abs()
        worst = float(difference.max())
        if not worst <= rollout.logprob_tolerance:
            row = int(torch.searchsorted(batch.offsets, difference.argmax(), right=True)) - 1
            raise RuntimeError(
                f"after sending weights {self._version}, rollout engine {ranks[row // len(self._probe_prompts)]} and "
                f"the policy differ by {worst:.4g} nats on a sampled token, more than rollout.logprob_tolerance = "
                f"{rollout.logprob_tolerance:g}: the engine does not have the policy's weights, or computes in another "
                "precision"
            )
        return {"sync/logprob_diff_max": worst}

    def save(self, folder: Path) -> None:
        with self._clock.phase("checkpoint"), self._policy:
            self._save(folder, self._learners())
            self._groups["policy"].run(lambda worker: worker.export.remote(folder.absolute() / "hf"))

    def load(self, folder: Path) -> None:
        self._load(folder, self._learners())

    def save_critic(self, folder: Path) -> None:
        self._save(folder, ["critic"])

    def load_critic(self, folder: Path) -> None:
        self._load(folder, ["critic"])

    def export_critic(self, folder: Path) -> None:
        """The critic for transformers, and for other runs."""
        self._groups["critic"].run(lambda worker: worker.export.remote(folder.absolute()))

    def _learners(self) -> list[Role]:
        return [role for role in self._groups if role in ("policy", "critic")]

    def _save(self, folder: Path, roles: list[Role]) -> None:
        folder = folder.absolute()  # workers run in other folders than the driver
        calls = [
            self._groups[role].start(lambda worker, role=role: worker.save.remote(folder / role)) for role in roles
        ]
        wait_for(calls, self._config.cluster.call_timeout_s)

    def _load(self, folder: Path, roles: list[Role]) -> None:
        folder = folder.absolute()
        calls = [
            self._groups[role].start(lambda worker, role=role: worker.load.remote(folder / role)) for role in roles
        ]
        wait_for(calls, self._config.cluster.call_timeout_s)
