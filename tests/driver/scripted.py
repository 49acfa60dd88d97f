"""Workers, rewards and records that live in memory and write down what the driver asks of them, in order.

They train nothing. What they answer is a plain function of what they are asked, so that a test can compute it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sae_rl import checkpoint
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from sae_rl.data.sampler import PromptSampler, Sampler
from sae_rl.digests import Digests, digests_of
from sae_rl.protocols import Metrics
from sae_rl.records.clock import Clock
from sae_rl.rewards.pool import Check, RewardPool, Rewards
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.run import Run
from sae_rl.types import Batch, Prompt, Rollout, Sampling, Scores, StepRecord, Targets

NUM_PROMPTS = 10
PATIENCE_S = 20


def until(condition: Callable[[], bool]) -> None:
    """Waits for another thread."""
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, "the other thread never came"
        time.sleep(0.002)


def make_config(folder: Path, *overrides: str) -> Config:
    """Two prompts x two responses a step, six steps; no evaluation and no pre-training unless a test asks for them."""
    return load_config(
        [
            f"output_dir={folder}",
            "model.path=nobody/nothing",
            "model.context_tokens=1024",
            "steps=6",
            "seed=100",
            "rollout.prompts_per_step=2",
            "rollout.group_size=2",
            "rollout.max_response_tokens=8",
            "learner.policy.num_mini_batches=1",
            "learner.critic.num_mini_batches=1",
            "learner.critic_pretraining.num_prompts=0",
            "checkpoint.every_steps=2",
            "checkpoint.keep_last=100",
            *overrides,
        ]
    )


def make_prompts(count: int = NUM_PROMPTS, verifier: str = "exact") -> list[Prompt]:
    return [
        Prompt(id=f"p{i}", text=f"question {i}", token_ids=(1000 + i, 7), answer="a", task="t", reward=verifier)
        for i in range(count)
    ]


def make_rollout(prompt: Prompt, sample: int, version: int, temperature: float, limit: int = 5) -> Rollout:
    """1 to 5 tokens, and not more than ``limit``, that depend on the prompt, the sample and the weights."""
    draw = torch.Generator().manual_seed(hash((prompt.token_ids, *prompt.response_prefix, sample, version)) % 2**31)
    length = min(int(torch.randint(1, 6, (1,), generator=draw)), limit)
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=torch.randint(0, 50, (length,), generator=draw),
        rollout_logprobs=torch.rand(length, generator=draw).mul(0.99).add(0.005).log(),
        text=f"{prompt.id}/{sample}/{version}",
        finish_reason="stop",
        policy_versions=torch.full((length,), version),
        temperature=temperature,
    )


def reward_of(rollout: Rollout) -> float:
    return float(int(rollout.token_ids.sum()) % 2)


def outcome_of(rollout: Rollout) -> Verdict | Failed:
    """Verifier "moody" fails on every third response, by the sum of its tokens; "broken" on all."""
    if rollout.prompt.reward == "broken" or (
        rollout.prompt.reward == "moody" and int(rollout.token_ids.sum()) % 3 == 0
    ):
        return Failed(rollout.prompt.reward)
    return Verdict(reward_of(rollout), f"sum {int(rollout.token_ids.sum())}")


def done(outcome: Verdict | Failed) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(outcome)
    return future


@dataclass
class Asked:
    """One call: its name and what it was given."""

    name: str
    of: dict[str, Any]


@dataclass
class ScriptedWorkers:
    """Implements `sae_rl.protocols.Workers`, and its own `RolloutEngines`."""

    log: list[Asked] = field(default_factory=list)
    qualities: Sequence[float] = ()  # of the critic after each pass of pre-training
    fail_in_update: int | None = None  # the update with this seed raises
    version: int | None = None
    num_gpus: int = 0
    passes: int = 0
    quality: float = 0.0

    @property
    def rollout(self) -> ScriptedWorkers:
        return self

    def _write(self, name: str, **of: Any) -> None:
        self.log.append(Asked(name, of))

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed_name: str
    ) -> Iterator[list[Rollout]]:
        """The last group comes first."""
        assert self.version is not None, "nothing is sampled before the first sync"
        self._write(
            "generate", prompts=[p.id for p in prompts], seed_name=seed_name, version=self.version, sampling=sampling
        )
        for prompt in reversed(prompts):
            yield [make_rollout(prompt, i, self.version, sampling.temperature) for i in range(group_size)]

    def open(self, *, group_size: int, sampling: Sampling) -> ScriptedGroups:
        return ScriptedGroups(self, group_size, sampling)

    def interrupt(self) -> None:
        self._write("interrupt")

    def score(self, batch: Batch) -> Scores:
        scores = Scores(
            old_logprobs=batch.rollout_logprobs - 0.01,
            values=torch.linspace(-1, 1, batch.num_tokens),
            ref_logprobs=None,
            entropies=-batch.rollout_logprobs,
        )
        self._write("score", batch=batch, scores=scores)
        return scores

    def score_all(self, batch: Batch) -> Scores:
        return self.score(batch)

    def policy_gradients(self, batch: Batch, advantages: Tensor, *, dimension: int, seed: int) -> Tensor:
        """``grad log pi`` of a token is the unit vector of its id modulo D."""
        self._write("policy_gradients", batch=batch, advantages=advantages, seed=seed)
        return advantages.float() @ torch.eye(dimension)[batch.token_ids.long() % dimension]

    def update(self, batch: Batch, scores: Scores, targets: Targets, *, seed: int) -> tuple[Metrics, Tensor]:
        self._write("update", batch=batch, scores=scores, targets=targets, seed=seed)
        if seed == self.fail_in_update:
            raise RuntimeError("a worker died")
        return {"policy/loss": 0.5}, batch.rollout_logprobs - 0.01

    def update_critic(
        self, batch: Batch, scores: Scores, targets: Targets, *, responses_per_update: int, seed: int
    ) -> Metrics:
        of = {"batch": batch, "scores": scores, "targets": targets, "seed": seed, "responses": responses_per_update}
        self._write("update_critic", **of)
        self.quality = self.qualities[self.passes]
        self.passes += 1
        return {"critic/loss": 1.0}

    def score_critic(self, batch: Batch) -> Scores:
        """The fraction ``quality`` of each response's reward: an explained variance of 1 - (1 - quality)^2."""
        self._write("score_critic", batch=batch)
        values = self.quality * batch.rewards.repeat_interleave(batch.lengths)
        return Scores(old_logprobs=None, values=values, ref_logprobs=None)

    def export_critic(self, folder: Path) -> None:
        self._write("export_critic", folder=folder)

    def set_critic_lr(self, lr: float | None) -> None:
        self._write("set_critic_lr", lr=lr)

    def sync_weights(self, version: int) -> Metrics:
        self._write("sync", version=version)
        self.version = version
        return {"sync/logprob_diff_max": 0.0}

    def save(self, folder: Path) -> Digests:
        self._write("save", folder=folder)
        (folder / "policy").mkdir()
        (file := folder.absolute() / "policy" / "weights").write_text(str(self.version))
        return digests_of([file])

    def load(self, folder: Path) -> None:
        self._write("load", folder=folder)
        assert (folder / "policy" / "weights").is_file()

    def save_critic(self, folder: Path) -> None:
        self._write("save_critic", quality=self.quality)
        folder.mkdir()
        (folder / "quality").write_text(str(self.quality))

    def load_critic(self, folder: Path) -> None:
        self.quality = float((folder / "quality").read_text())
        self._write("load_critic", quality=self.quality)

    def asked(self, *names: str) -> list[Asked]:
        return [call for call in self.log if call.name in names]


class ScriptedGroups:
    """The group that was added last comes first, so that the first ones are left over again and again."""

    def __init__(self, workers: ScriptedWorkers, group_size: int, sampling: Sampling) -> None:
        self._workers, self._group_size, self._sampling = workers, group_size, sampling
        self._open: list[tuple[Prompt, int]] = []

    def add(self, prompts: Sequence[Prompt], seed_name: str) -> None:
        version = self._workers.version
        assert version is not None
        self._workers.log.append(
            Asked("add", {"prompts": [p.id for p in prompts], "seed_name": seed_name, "version": version})
        )
        self._open += [(prompt, version) for prompt in prompts]

    def __iter__(self) -> Iterator[list[Rollout]]:
        return self

    def __next__(self) -> list[Rollout]:
        if not self._open:
            raise StopIteration
        prompt, version = self._open.pop()
        limit = self._sampling.max_tokens - len(prompt.response_prefix)
        return [make_rollout(prompt, i, version, self._sampling.temperature, limit) for i in range(self._group_size)]


class ScriptedRewards:
    def __init__(self, log: list[Asked]) -> None:
        self._log = log

    def submit(self, rollouts: Sequence[Rollout]) -> list[Check]:
        return [Check(r.prompt.id, done(outcome_of(r))) for r in rollouts]

    def collect(self, checks: Sequence[Check]) -> Rewards:
        self._log.append(Asked("reward", {"responses": len(checks)}))
        return Rewards([check.future.result() for check in checks])


class ScriptedRecords:
    """Implements `sae_rl.protocols.Recorder`."""

    def __init__(self, log: list[Asked]) -> None:
        self._log = log

    def note(self, text: str) -> None:
        if not text.startswith("ready after"):  # the seconds of the start
            self._log.append(Asked("note", {"text": text}))

    def log(self, step: int, metrics: Metrics, phase: str = "train") -> None:
        self._log.append(Asked("log", {"step": step, "metrics": dict(metrics), "phase": phase}))

    def rollouts(self, record: StepRecord) -> None:
        self._log.append(Asked("rollouts", {"step": record.step, "record": record}))

    def samples(self, step: int, *values: Any) -> None:
        self._log.append(Asked("samples", {"step": step, "values": values}))


def make_run(
    config: Config,
    workers: ScriptedWorkers,
    resume_from: Path | None = None,
    heldout: list[Prompt] | None = None,
    verifier: str = "exact",
    sampler: PromptSampler | None = None,
) -> Run:
    sampler = sampler or Sampler(make_prompts(verifier=verifier), config.seed)
    if resume_from is not None:
        sampler.load_state(checkpoint.read_state(resume_from).sampler)
    return Run(
        config=config,
        sampler=sampler,
        heldout=heldout or [],
        workers=workers,
        rewards=cast(RewardPool, ScriptedRewards(workers.log)),
        records=ScriptedRecords(workers.log),
        clock=Clock(),
        resume_from=resume_from,
    )
