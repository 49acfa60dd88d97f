"""The training loop: PPO with a value model on verifiable rewards. It reads like the algorithm, and holds nothing else.

What a run is made of comes in as one `Run`; how workers are started, how prompts are loaded and where metrics go is
decided in `sae_rl.commands.train`.
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
from sae_rl.algo.segmentation import segment
from sae_rl.algo.stats import (
    advantage_stats,
    critic_stats,
    mismatch_stats,
    probability_stats,
    rollout_stats,
    segment_stats,
    staleness_stats,
)
from sae_rl.config.schema import AlgorithmConfig, Config
from sae_rl.critic.pretraining import pretrain_critic
from sae_rl.data.sampler import PromptSampler, SamplerState
from sae_rl.evaluation.evaluate import evaluate
from sae_rl.protocols import Metrics, Recorder, Workers
from sae_rl.records.clock import Clock
from sae_rl.rewards.pool import RewardPool, Rewards
from sae_rl.rollouts.groups import Early, FailedRule, StepSamples, collect, collected, groups_of, sample
from sae_rl.seeds import derive_seed
from sae_rl.types import Batch, Prompt, Rollout, Scores, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the loop works with."""

    config: Config
    sampler: PromptSampler  # behind the checkpoint that the run resumes from
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
    """Every step that is left of a run: sampling, learning and sending weights take turns.

    Raises:
        RuntimeError: rewards, weights or a worker failed; the last checkpoint stays usable.
    """
    for step in range(begin(run), run.config.steps):
        samples = sample_step(run, step)  # y ~ pi_rollout(. | x), and R(x, y), checked by a program
        result = learn(run, step, samples)  # pi_theta and V
        synced = run.workers.sync_weights(step + 1)  # pi_rollout <- pi_theta
        evaluate_if_due(run, step + 1)
        finish(run, step, samples, result, synced)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What was computed of a batch, and what came of the update."""

    opens: Tensor  # (N,)
    scores: Scores
    targets: Targets  # before whitening
    metrics: Metrics


def learn(run: Run, step: int, samples: StepSamples) -> StepResult:
    """One step of PPO: values, segments, advantages, and the updates of policy and critic."""
    config, workers, algorithm = run.config, run.workers, run.config.algorithm
    batch = Batch.of(samples.rollouts, samples.scores)
    scores = workers.score(batch, samples.scoring, samples.scored_rows)  # V(s_t), log pi_old, log pi_ref
    with run.clock.phase("advantage"):
        token_rewards = algorithm.token_rewards(batch, scores)  # r_t: R at the end, minus beta KL_t
        opens = segment(algorithm.segmenter, batch, scores)  # pi(a_t | s_t) < p opens a segment
        # A_t = delta_t + gamma lambda_t A_{t+1}, and the critic's targets
        targets = estimate(algorithm.estimator, batch, scores, token_rewards, opens)
        whitened = replace(targets, advantages=algorithm.whitening(targets.advantages, batch.action_mask))
    seed = derive_seed(config.seed, "update", step)
    with kept_if_it_fails(config.output_dir, step, batch, scores, whitened):
        metrics = workers.update(batch, scores, whitened, seed=seed)  # PPO epochs of policy and critic
    metrics |= measure(algorithm, step, batch, scores, targets, opens)
    return StepResult(opens=opens, scores=scores, targets=targets, metrics=metrics)


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
    config, pretraining = run.config, run.config.learner.critic_pretraining
    step = restore(run)
    run.workers.sync_weights(step)
    if run.resume_from is None:
        evaluate_if_due(run, 0)
        if config.algorithm.needs_critic and pretraining.num_prompts and pretraining.checkpoint is None:
            prepare_critic(run)
        save(run, 0, run.sampler.state())
    run.clock.lap()
    return step


def restore(run: Run) -> int:
    """Loads the checkpoint that the run resumes from, if any. Returns the steps that are done."""
    if run.resume_from is None:
        return 0
    run.workers.load(run.resume_from)
    return checkpoint.read_state(run.resume_from).step


def prepare_critic(run: Run) -> tuple[float, int]:
    """Pre-trains the critic on rollouts of the initial policy; its prompts come in an order of their own.

    Returns:
        Its explained variance on held-out prompts, and the number of responses.
    """
    config, pretraining = run.config, run.config.learner.critic_pretraining
    prompts = run.sampler.anew(derive_seed(config.seed, "pretraining")).next(pretraining.num_prompts)
    rollouts, rewards = respond(run, prompts, "pretraining")
    groups = groups_of(rollouts, rewards, config.rollout.group_size, FailedRule.of(config))
    kept = collected(groups, {}, run.sampler.state())
    best = pretrain_critic(
        Batch.of(kept.rollouts, kept.scores),
        run.workers,
        config.algorithm,
        pretraining,
        scratch=config.output_dir / ".best_critic",
        seed=derive_seed(config.seed, "pretraining"),
        log=lambda epoch, metrics: run.records.log(epoch, metrics, phase="pretraining"),
    )
    run.workers.set_critic_lr(None)
    left_out = f" ({n} left out: their checks failed)" if (n := len(rollouts) - len(kept.rollouts)) else ""
    run.records.note(
        f"critic pre-trained on {len(kept.rollouts)} responses{left_out}: held-out explained variance {best:.3f}"
    )
    return best, len(kept.rollouts)


def sample_step(run: Run, step: int) -> StepSamples:
    """The groups of one step; parts of it may be scored while others are sampled."""
    rollout, parts = run.config.rollout, run.config.schedule.scoring_parts
    early = Early(parts, run.workers.start_score) if parts > 1 else None

    def respond_to(prompts: list[Prompt], round_number: int) -> tuple[list[Rollout], Rewards]:
        return respond(
            run, prompts, f"step {step}" if round_number == 1 else f"step {step} round {round_number}", early
        )

    samples = collect(
        run.sampler,
        rollout.prompts_per_step,
        rollout.group_size,
        rollout.dynamic_sampling,
        FailedRule.of(run.config),
        respond_to,
    )
    return replace(samples, scoring=early.started) if early else samples


def respond(
    run: Run, prompts: list[Prompt], seed_name: str, early: Early | None = None
) -> tuple[list[Rollout], Rewards]:
    """Responses as training samples them, with their logprobs, and their rewards."""
    rollout = run.config.rollout
    return sample(
        prompts,
        run.workers.rollout,
        run.rewards,
        run.clock,
        group_size=rollout.group_size,
        sampling=rollout.sampling(rollout.max_response_tokens),
        seed_name=seed_name,
        early=early,
    )


def measure(
    algorithm: AlgorithmConfig, step: int, batch: Batch, scores: Scores, targets: Targets, opens: Tensor
) -> Metrics:
    """Everything there is to say about a step besides the update."""
    metrics = rollout_stats(batch) | segment_stats(batch, opens) | probability_stats(batch)
    metrics |= staleness_stats(batch, step)
    metrics |= advantage_stats(batch, targets.advantages) | mismatch_stats(batch, scores)
    if algorithm.token_rewards.overlong_buffer_tokens:
        metrics["rollout/overlong_penalty_mean"] = float(algorithm.token_rewards.overlong(batch).mean())
    if scores.values is not None and targets.returns is not None:
        metrics |= critic_stats(batch, scores.values, targets.returns, opens)
    return metrics


def finish(run: Run, step: int, samples: StepSamples, result: StepResult, more: Metrics) -> None:
    """Records and checkpoint of step ``step``."""
    config, done = run.config, step + 1
    run.records.rollouts(
        step, samples.rollouts, samples.scores, samples.reasons, result.opens, result.scores, result.targets
    )
    times = run.clock.lap()
    metrics = samples.metrics | result.metrics | more | times
    metrics |= throughput(result.opens.numel(), metrics, run.workers.num_gpus)
    metrics["data/epoch"] = float(samples.sampler["epoch"])
    if levels := samples.sampler["levels"]:
        metrics["data/level_mean"] = sum(levels) / len(levels)
    run.records.log(step, metrics)
    # Behind the records: a resumed run drops what was recorded after its checkpoint, and nothing else.
    if done == config.steps or (config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0):
        save(run, done, samples.sampler)


def throughput(num_tokens: int, times: Metrics, num_gpus: int) -> Metrics:
    """Response tokens per second of the whole step, and of each phase that works through them; also for each GPU."""
    phases = {"": "time/step_s", "score_": "time/score_s", "update_": "time/update_s"}
    phases["generate_"] = "time/generate_s" if "time/generate_s" in times else "ahead/generate_s"
    rates = {
        f"throughput/{name}tokens_per_s": num_tokens / times[phase]
        for name, phase in phases.items()
        if times.get(phase)
    }
    return rates | ({f"{name}_per_gpu": rate / num_gpus for name, rate in rates.items()} if num_gpus else {})


def evaluate_if_due(run: Run, done: int) -> None:
    """After ``done`` steps; always after the last."""
    every = run.config.evaluation.every_steps
    if every and (done % every == 0 or done == run.config.steps):
        evaluate_policy(run, done)


def evaluate_policy(run: Run, step: int) -> None:
    with run.clock.phase("evaluate"):
        result = evaluate(
            run.heldout,
            run.workers.rollout,
            run.rewards,
            run.clock,
            run.config.evaluation,
            run.config.rollout.max_response_tokens,
            run.config.algorithm.segmenter,
        )
    run.records.samples(step, result.rollouts, result.rewards, result.opens)
    run.records.log(step, result.metrics(), phase="evaluation")


def save(run: Run, step: int, sampler: SamplerState) -> None:
    with run.clock.phase("checkpoint"):
        state = checkpoint.DriverState(step=step, sampler=sampler)
        checkpoint.save(run.checkpoints, state, run.workers, run.config.checkpoint.keep_last)
