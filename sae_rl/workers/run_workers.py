"""All workers of one run, as the driver calls them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from sae_rl.algo.ragged import check_tokens
from sae_rl.algo.value_losses import check_returns
from sae_rl.backends.deepspeed import Rank
from sae_rl.config.schema import Config
from sae_rl.digests import Digests
from sae_rl.records.clock import Clock
from sae_rl.types import Batch, Prompt, Scores, Targets
from sae_rl.workers.engines import Engines
from sae_rl.workers.group import Call, WorkerGroup, wait_for
from sae_rl.workers.placement import plan
from sae_rl.workers.rank_results import merge_scores, update_metrics
from sae_rl.workers.rollout_pool import RolloutPool
from sae_rl.workers.shared_folder import check_shared, check_written
from sae_rl.workers.table import WORKERS
from sae_rl.workers.weight_sync import WeightSync


class RunWorkers:
    """Implements `sae_rl.protocols.Workers`.

    Args:
        groups: the started processes of each role; roles that the run does not need are missing.
        probe_prompts: what a weight sync is checked with.
        note: prints a line for the user.
    """

    def __init__(
        self,
        config: Config,
        groups: dict[str, WorkerGroup],
        probe_prompts: Sequence[Prompt],
        clock: Clock,
        note: Callable[[str], None] = print,
    ) -> None:
        self._config, self._groups, self._clock, self._note = config, groups, clock, note
        self._learners = {role: group for role, group in groups.items() if role != "rollout"}
        self._trained = {role: group for role, group in groups.items() if role in ("policy", "critic")}
        # Held while the policy works: its ranks need calls in one order, and its weights must not change while they are sent.
        self._policy_lock = threading.Lock()
        self._rollout: RolloutPool | None = None
        self._weights: WeightSync | None = None
        if "rollout" in groups:
            engines = Engines(groups["rollout"], config, self._load_engine, self._sync_one, note)
            self._rollout = RolloutPool(engines, config)
        if self._rollout is not None and "policy" in groups:
            self._weights = WeightSync(
                config,
                groups["policy"],
                self._rollout,
                self._policy_lock,
                probe_prompts,
                lambda batch: self._score(batch, ["policy"]),
            )

    def start(self, loaded: Sequence[str] = ()) -> None:
        """Loads all models, at the same time where they do not share GPUs with engines.

        Args:
            loaded: roles whose processes have loaded theirs before.

        Raises:
            ConfigError: a learner writes to another ``output_dir`` than the driver.
        """
        config = self._config
        limit = config.cluster.start_timeout_s
        loading = functools.partial(wait_for, timeout_s=limit, doing="load its model", note=self._note)
        for group in self._groups.values():
            group.locate(limit, note=self._note)
        if self._trained:
            check_shared(self._trained, config.output_dir)
        calls = []
        for role, group in self._groups.items():  # "rollout" is the first
            if role in loaded:
                continue
            calls.append(group.start(self._load_engine) if role == "rollout" else self._start_learner(role))
            if config.cluster.colocate_rollout:  # one after the other, since vLLM measures the free memory of its GPU
                loading([calls[-1]])
        loading(calls)
        if "rollout" in self._groups:
            self._groups["rollout"].locate(limit)  # once more, now with vLLM's own processes

    @property
    def rollout(self) -> RolloutPool:
        assert self._rollout is not None, "these workers were started without rollout engines"
        return self._rollout

    @property
    def has_idle_engines(self) -> bool:
        """Whether another run could use the engines as they are: awake, and without requests."""
        is_alone = not self._config.cluster.colocate_rollout
        return self._rollout is not None and is_alone and self._rollout.engines.is_idle

    @property
    def num_gpus(self) -> int:
        """GPUs that these workers hold; 0 on CPUs."""
        total = plan(self._config, list(self._groups)).total
        return int(total.get("GPU", 0))

    def counts(self) -> dict[str, int]:
        """The number of workers of each role."""
        return {role: len(group.workers) for role, group in self._groups.items()}

    def all_reduce(self) -> dict[str, int]:
        """The number of ranks of each learner. Raises RuntimeError if their process group counts another one."""
        answers = self._run_all(self._learners, lambda worker, _: worker.all_reduce.remote())
        for role, ranks in answers.items():
            if set(ranks) != {len(ranks)}:
                raise RuntimeError(f"the {len(ranks)} ranks of the {role} sum 1 over their process group to {ranks}")
        return {role: len(ranks) for role, ranks in answers.items()}

    def score_all(self, batch: Batch) -> Scores:
        """What every learner computes from a batch, also where `score` leaves it out."""
        with self._clock.phase("score"), self._policy_lock:
            self._free_gpus()
            return self._score(batch, list(self._learners))

    def score(self, batch: Batch) -> Scores:
        with self._clock.phase("score"), self._policy_lock:
            self._free_gpus()
            roles = [role for role in self._learners if role != "policy" or self._config.scores_policy]
            scores = self._score(batch, roles)
        is_rollout = self._config.algorithm.policy_loss.old_logprobs == "rollout"
        return replace(scores, old_logprobs=batch.rollout_logprobs) if is_rollout else scores

    def policy_gradients(self, batch: Batch, advantages: Tensor, *, dimension: int, seed: int) -> Tensor:
        group = self._groups["policy"]
        with self._clock.phase("score"), self._policy_lock:
            self._free_gpus()
            shared, threads = (
                [ray.put(value) for value in (batch, advantages)],
                self._threads({"policy": group})["policy"],
            )
            parts = group.run(lambda worker: worker.gradients.remote(*shared, dimension, seed, threads))
        return torch.stack(parts).sum(0).float()

    def score_critic(self, batch: Batch) -> Scores:
        with self._clock.phase("score"):
            self._free_gpus()
            return self._score(batch, ["critic"])

    def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> tuple[dict[str, float], Tensor]:
        self._check_returns(batch, targets)
        with self._clock.phase("update"), self._policy_lock:
            self._free_gpus()
            shared = [ray.put(value) for value in (batch, scores, targets)]
            answers = self._take_turns(self._trained, lambda worker, _: worker.update.remote(*shared, seed))
            if self._weights is not None:
                self._weights.version += 1
        logprobs = merge_scores([tokens for _, tokens in answers["policy"]], batch).get("logprobs", scores.old_logprobs)
        assert logprobs is not None, "the policy returns what it was not given"
        if scores.old_logprobs is None:
            check_tokens("log pi_old", logprobs, batch)
        answers["policy"] = [updates for updates, _ in answers["policy"]]
        metrics: dict[str, float] = {}
        for role, ranks in answers.items():
            metrics |= update_metrics(ranks, role, self._config.cluster.peak_tflops)
        if self._weights is not None:  # a mean norm of 0, or NaN where all updates were skipped, changes no weight
            self._weights.was_updated |= metrics["policy/grad_norm"] > 0 and metrics["policy/lr"] > 0
        return metrics, logprobs

    def update_critic(
        self, batch: Batch, scores: Scores, targets: Targets, *, responses_per_update: int, seed: int
    ) -> dict[str, float]:
        self._check_returns(batch, targets)
        with self._clock.phase("update"):
            self._free_gpus()
            shared = [ray.put(value) for value in (batch, scores, targets)]
            ranks = self._groups["critic"].run(
                lambda worker: worker.pretrain.remote(*shared, responses_per_update, seed)
            )
        return update_metrics(ranks, "critic", None)

    def _check_returns(self, batch: Batch, targets: Targets) -> None:
        if targets.returns is not None and self._config.algorithm.needs_critic:
            check_returns(self._config.algorithm.value_loss, targets.returns, batch)

    def set_critic_lr(self, lr: float | None) -> None:
        self._groups["critic"].run(lambda worker: worker.set_lr.remote(lr))

    def sync_weights(self, version: int) -> dict[str, float]:
        assert self._weights is not None, "a sync needs the policy and rollout engines"
        with self._clock.phase("sync"), self.rollout.lock, self._policy_lock:
            return self._weights.sync(version)

    def save(self, folder: Path) -> Digests:
        written: Digests = {}
        with self._clock.phase("checkpoint"), self._policy_lock:
            answers = self._run_all(self._trained, lambda worker, role: worker.save.remote(folder.absolute() / role))
            for role, ranks in answers.items():
                written |= check_written(self._groups[role], ranks)
            return written | self._export("policy", folder / "hf")

    def load(self, folder: Path) -> None:
        self._run_all(self._trained, lambda worker, role: worker.load.remote(folder.absolute() / role))
        if self._weights is not None:
            self._weights.was_updated = False  # the weights may be those that were sent last

    def save_critic(self, folder: Path) -> None:
        group = self._groups["critic"]
        check_written(group, group.run(lambda worker: worker.save.remote(folder.absolute() / "critic")))

    def load_critic(self, folder: Path) -> None:
        self._groups["critic"].run(lambda worker: worker.load.remote(folder.absolute() / "critic"))

    def export_critic(self, folder: Path) -> None:
        self._export("critic", folder)

    def _export(self, role: str, folder: Path) -> Digests:
        group = self._groups[role]
        exported: list[Digests] = group.run(lambda worker: worker.export.remote(folder.absolute()))
        return check_written(group, exported[:1])  # rank 0 writes

    def _load_engine(self, worker: ActorHandle) -> Any:
        return worker.start.remote(*WORKERS["rollout"].settings(self._config))

    def _start_learner(self, role: str) -> Call:
        config, group = self._config, self._groups[role]
        ((address, port),) = group.run(lambda worker: worker.free_address.remote(), [0])
        references: dict[int, Any] = {}
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
            references[index] = worker.start.remote(rank, *WORKERS[role].settings(config))
        return Call(group, references)

    def _sync_one(self, rank: int) -> None:
        assert self._weights is not None, "a replaced engine waits for weights only after a sync"
        self._weights.sync_one(rank)

    def _free_gpus(self) -> None:
        """Engines that share the learners' GPUs go to sleep, because the learners are about to work."""
        if self._rollout is not None:
            self._rollout.sleep()

    def _score(self, batch: Batch, roles: Sequence[str]) -> Scores:
        shared, groups = ray.put(batch), {role: self._groups[role] for role in roles}
        threads = self._threads(groups)
        answers = self._take_turns(groups, lambda worker, role: worker.score.remote(shared, threads[role]))
        merged = {name: flat for ranks in answers.values() for name, flat in merge_scores(ranks, batch).items()}
        final_values = merged.get("final_values")
        return Scores(
            old_logprobs=merged.get("old_logprobs"),
            entropies=merged.get("entropies"),
            values=merged.get("values"),
            final_values=None if final_values is None else final_values[batch.last_sampled],
            ref_logprobs=merged.get("ref_logprobs"),
            value_spread=merged.get("value_spread"),
        )

    def _threads(self, groups: dict[str, WorkerGroup]) -> dict[str, int]:
        """Threads of each role's ranks while only these roles work: on CPUs they share the threads of those that wait."""
        cluster = self._config.cluster
        own = {role: int(getattr(cluster, role).threads_per_worker) for role in self._learners}
        waiting = sum(len(group.workers) * own[role] for role, group in self._learners.items() if role not in groups)
        ranks = sum(len(group.workers) for group in groups.values())
        share = waiting // ranks if cluster.device == "cpu" else 0
        return {role: own[role] + share for role in groups}

    def _take_turns(
        self, groups: dict[str, WorkerGroup], call: Callable[[ActorHandle, str], Any]
    ) -> dict[str, list[Any]]:
        """`_run_all`, but one role after the other where they share GPUs, whose memory has room for one role's work."""
        if not self._config.cluster.shares_learner_gpus:
            return self._run_all(groups, call)
        return {role: self._run_all({role: group}, call)[role] for role, group in groups.items()}

    def _run_all(self, groups: dict[str, WorkerGroup], call: Callable[[ActorHandle, str], Any]) -> dict[str, list[Any]]:
        """A remote call on every rank of several roles at the same time; results by role and rank."""
        calls = [group.start(lambda worker, role=role: call(worker, role)) for role, group in groups.items()]
        return dict(zip(groups, wait_for(calls, self._config.cluster.call_timeout_s), strict=True))
