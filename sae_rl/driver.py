"""The training loop: PPO with a value model on verifiable rewards. It reads like the algorithm, and holds nothing else.

What a run is made of comes in as one `Run`; how workers are started, how prompts are loaded and where metrics go is
decided in `sae_rl.run`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from sae_rl import checkpoint
from sae_rl.algo.estimators import estimate
from sae_rl.algo.segmenters import segment
from sae_rl.algo.stats import (
    advantage_stats,
    critic_stats,
    mismatch_stats,
    probability_stats,
    rollout_stats,
    segment_stats,
)
from sae_rl.clock import Clock
from sae_rl.config import AlgorithmConfig, Config
from sae_rl.data.sampler import Sampler
from sae_rl.evaluate import evaluate
from sae_rl.pretraining import pretrain_critic
from sae_rl.protocols import Metrics, Recorder, Workers
from sae_rl.rewards.pool import RewardPool, Rewards
from sae_rl.sampling import Collected, collect, sample
from sae_rl.seeds import derive_seed
from sae_rl.types import Batch, Prompt, Rollout, Scores, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the loop works with."""

    config: Config
    sampler: Sampler
    heldout: list[Prompt]
    workers: Workers
    rewards: RewardPool
    records: Recorder
    clock: Clock
    resume_from: Path | None  # a checkpoint; None: a new run

    @property
    def checkpoints(self) -> Path:
        return self.config.output_dir / "checkpoints"


FAILED_UPDATE = "failed_update.pt"


def train(run: Run) -> None:
    """Every step that is left of a run.

    Raises:
        RuntimeError: rewards, weights or a worker failed; the last checkpoint stays usable.
    """
    config, workers, clock, algorithm = run.config, run.workers, run.clock, run.config.algorithm
    for step in range(begin(run), config.steps):
        sampled = gather(run, step)  # y ~ pi_rollout(. | x), and R(x, y), checked by a program
        batch = Batch.of(sampled.rollouts, sampled.scores)
        scores = workers.score(batch)  # V(s_t), log pi_old, log pi_ref
        with clock.phase("advantage"):
            token_rewards = algorithm.token_rewards(batch, scores)  # r_t: R at the end, minus beta KL_t
            opens = segment(algorithm.segmenter, batch, scores)  # pi(a_t | s_t) < p opens a segment
            # A_t = delta_t + gamma lambda_t A_{t+1}, and the critic's targets
            targets = estimate(algorithm.estimator, batch, scores, token_rewards, opens)
            whitened = replace(targets, advantages=algorithm.whitening(targets.advantages, batch.sampled))
        seed = derive_seed(config.seed, "update", step)
        with kept_if_it_fails(config.output_dir, step, batch, scores, whitened):
            metrics = workers.update(batch, scores, whitened, seed=seed)  # PPO epochs of policy and critic
        metrics |= workers.sync_weights(step + 1)  # pi_rollout <- pi_theta
        metrics |= sampled.metrics | measure(algorithm, batch, scores, targets, opens)
        finish(run, step, metrics, sampled, opens, scores, targets)


@contextlib.contextmanager
def kept_if_it_fails(folder: Path, step: int, *inputs: Batch | Scores | Targets) -> Iterator[None]:
    """Saves what an update was given, for `torch.load`, if it raises; the error says where."""
    try:
        yield
    except Exception as error:
        path = folder / FAILED_UPDATE
        try:
            torch.save({f.name: getattr(part, f.name) for part in inputs for f in fields(part)}, path)
            kept = f"its batch is in {path}"
        except (OSError, RuntimeError) as unsaved:  # a full disk must not hide what happened before
            path.unlink(missing_ok=True)
            kept = f"its batch could not be written to {path} ({unsaved})"
        raise RuntimeError(f"the update of step {step} failed; {kept}. {error}") from error


def begin(run: Run) -> int:
    """Resumes, or prepares the first step: a first evaluation and the critic's pre-training. Returns the next step."""
    config, workers = run.config, run.workers
    if run.resume_from is not None:
        state = checkpoint.read_state(run.resume_from)
        workers.load(run.resume_from)
        run.sampler.load_state(state.sampler)
        workers.sync_weights(state.step)
        run.clock.lap()
        return state.step
    workers.sync_weights(0)
    if config.evaluation.every_steps:
        evaluate_policy(run, 0)
    pretraining = config.learner.critic_pretraining
    if config.algorithm.needs_critic and pretraining.num_prompts and pretraining.checkpoint is None:
        prepare_critic(run)
    save(run, 0)
    run.clock.lap()
    return 0


def prepare_critic(run: Run) -> tuple[float, int]:
    """Pre-trains the critic on rollouts of the initial policy; its prompts come in an order of their own.

    Returns:
        Its explained variance on held-out prompts, and the number of responses.
    """
    config, pretraining = run.config, run.config.learner.critic_pretraining
    prompts = Sampler(run.sampler.prompts, derive_seed(config.seed, "pretraining")).next(pretraining.num_prompts)
    rollouts, rewards = respond(run, prompts, "pretraining")
    best = pretrain_critic(
        Batch.of(rollouts, rewards.scores),
        run.workers,
        config.algorithm,
        pretraining,
        scratch=config.output_dir / ".best_critic",
        seed=derive_seed(config.seed, "pretraining"),
        log=lambda epoch, metrics: run.records.log(epoch, metrics, phase="pretraining"),
    )
    run.workers.set_critic_lr(None)
    run.records.note(f"critic pre-trained on {len(rollouts)} responses: held-out explained variance {best:.3f}")
    return best, len(rollouts)


def gather(run: Run, step: int) -> Collected:
    """The groups of one step."""
    rollout = run.config.rollout

    def respond_to(prompts: list[Prompt], turn: int) -> tuple[list[Rollout], Rewards]:
        return respond(run, prompts, f"step {step}" if turn == 1 else f"step {step} round {turn}")

    return collect(run.sampler, rollout.prompts_per_step, rollout.group_size, rollout.dynamic_sampling, respond_to)


def respond(run: Run, prompts: list[Prompt], stream: str) -> tuple[list[Rollout], Rewards]:
    """Responses as training samples them, with their logprobs, and their rewards."""
    rollout = run.config.rollout
    return sample(
        prompts,
        run.workers.rollout,
        run.rewards,
        run.clock,
        group_size=rollout.group_size,
        max_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature,
        stream=stream,
    )


def measure(algorithm: AlgorithmConfig, batch: Batch, scores: Scores, targets: Targets, opens: Tensor) -> Metrics:
    """Everything there is to say about a step besides the update."""
    metrics = rollout_stats(batch) | segment_stats(batch, opens) | probability_stats(batch)
    metrics |= advantage_stats(batch, targets.advantages) | mismatch_stats(batch, scores)
    if algorithm.token_rewards.overlong_buffer_tokens:
        metrics["rollout/overlong_penalty_mean"] = float(algorithm.token_rewards.overlong(batch).mean())
    if scores.values is not None and targets.returns is not None:
        metrics |= critic_stats(batch, scores.values, targets.returns, opens)
    return metrics


def finish(
    run: Run, step: int, metrics: Metrics, sampled: Collected, opens: Tensor, scores: Scores, targets: Targets
) -> None:
    """After the update: evaluation, checkpoint and records of step ``step``."""
    config, done = run.config, step + 1
    last = done == config.steps
    if config.evaluation.every_steps and (last or done % config.evaluation.every_steps == 0):
        evaluate_policy(run, done)
    run.records.rollouts(step, sampled.rollouts, sampled.scores, opens, scores, targets)
    times = run.clock.lap()
    metrics |= throughput(opens.numel(), times, run.workers.num_gpus)
    run.records.log(step, metrics | times | {"data/epoch": float(run.sampler.epoch)})
    # Behind the records: a resumed run drops what was recorded after its checkpoint, and nothing else.
    if last or (config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0):
        save(run, done)


def throughput(num_tokens: int, times: Metrics, num_gpus: int) -> Metrics:
    """Response tokens per second of the whole step, and of each phase that works through them; also for each GPU."""
    phases = {"": "step", **{f"{phase}_": phase for phase in ("generate", "score", "update")}}
    rates = {
        f"throughput/{name}tokens_per_s": num_tokens / times[f"time/{phase}_s"]
        for name, phase in phases.items()
        if times.get(f"time/{phase}_s")
    }
    return rates | ({f"{name}_per_gpu": rate / num_gpus for name, rate in rates.items()} if num_gpus else {})


def evaluate_policy(run: Run, step: int) -> None:
    with run.clock.phase("evaluate"):
        result = evaluate(
            run.heldout,
            run.workers.rollout,
            run.rewards,
            run.clock,
            run.config.evaluation,
            run.config.rollout.max_response_tokens,
        )
    run.records.log(step, result.metrics(), phase="evaluation")


def save(run: Run, step: int) -> None:
    with run.clock.phase("checkpoint"):
        state = checkpoint.DriverState(step=step, sampler=run.sampler.state())
        checkpoint.save(run.checkpoints, state, run.workers, run.config.checkpoint.keep_last)
