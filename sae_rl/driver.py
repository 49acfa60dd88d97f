"""The training loop: PPO with a critic on verifiable rewards. It reads like the algorithm, and holds nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from sae_rl import checkpoint
from sae_rl.algo.estimators import estimate
from sae_rl.algo.segmentation import segment
from sae_rl.critic.pretraining import pretrain
from sae_rl.data.sampler import SamplerState
from sae_rl.evaluation.evaluate import Evaluation, evaluate
from sae_rl.protocols import Metrics
from sae_rl.records.failed_update import batch_saved_on_failure
from sae_rl.records.step_metrics import batch_metrics, throughput
from sae_rl.rollouts.continuations import PolicyContinuations
from sae_rl.rollouts.groups import StepSamples
from sae_rl.rollouts.step import sample_step
from sae_rl.run import Run
from sae_rl.seeds import derive_seed
from sae_rl.types import Batch, Scores, StepRecord, Targets


def train(run: Run) -> None:
    """Runs every remaining step; sampling, training and sending weights take turns.

    Raises:
        RuntimeError: rewards, weights or a worker failed; the last checkpoint stays usable.
    """
    for step in range(begin(run), run.config.steps):
        samples = sample_step(run, step)  # y ~ pi_rollout(. | x), and R(x, y), checked by a program
        result = learn(run, step, samples)  # pi_theta and V
        synced = run.workers.sync_weights(step + 1)  # pi_rollout <- pi_theta
        evaluated = evaluate_if_due(run, step + 1)
        finish(run, step, samples, result, synced, evaluated)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What was computed from a batch, and the metrics of its update."""

    opens: Tensor  # (N,)
    scores: Scores  # with the values of the value source
    targets: Targets  # before whitening
    returns: Tensor | None  # (N,) Monte-Carlo returns, which judge a critic; None: there is none
    metrics: Metrics
    critic_values: Tensor | None  # (N,) where they are not the values of ``scores``


def learn(run: Run, step: int, samples: StepSamples) -> StepResult:
    """One step of PPO: values, segments, advantages, and the updates of policy and critic."""
    config, workers, algorithm = run.config, run.workers, run.config.algorithm
    batch = Batch.of(samples.rollouts, samples.rewards)
    scores = workers.score(batch)  # V(s_t), log pi_old, log pi_ref
    with run.clock.phase("advantage"):
        token_rewards = algorithm.token_rewards(batch, scores)  # r_t: R at the last token, minus beta KL_t
        opens = segment(algorithm.segmenter, batch, scores)  # pi(a_t | s_t) < p opens a segment
    continuations = PolicyContinuations(run, samples.rollouts, opens, f"step {step}")
    with run.clock.phase("values"):  # V(s_t) from elsewhere than the critic
        valued = algorithm.with_values(batch, scores, token_rewards, opens, continuations)
    with run.clock.phase("advantage"):
        # A_t = delta_t + gamma lambda_t A_{t+1}, and the critic's targets
        targets = estimate(algorithm.estimator, batch, valued, token_rewards, opens)
        whitened = replace(targets, advantages=algorithm.whitening(targets.advantages, batch.action_mask))
        returns = algorithm.monte_carlo_returns(batch, scores, opens) if algorithm.needs_critic else None
    seed = derive_seed(config.seed, "update", step)
    with batch_saved_on_failure(config.output_dir, step, batch, scores, whitened):
        metrics, logprobs = workers.update(batch, scores, whitened, seed=seed)  # PPO epochs of policy and critic
    valued = valued if valued.old_logprobs is not None else replace(valued, old_logprobs=logprobs)
    metrics |= batch_metrics(algorithm, step, batch, scores, targets, opens, logprobs, valued.values, returns)
    metrics |= continuations.metrics()
    critic_values = None if valued.values is scores.values else scores.values
    return StepResult(
        opens=opens, scores=valued, targets=targets, returns=returns, metrics=metrics, critic_values=critic_values
    )


def begin(run: Run) -> int:
    """Resumes a run, or prepares a new one: first evaluation and critic pre-training. Returns the next step."""
    config, pretraining = run.config, run.config.learner.critic_pretraining
    step = restore(run)
    run.workers.sync_weights(step)
    if run.resume_from is None:
        record_evaluation(run, 0, evaluate_if_due(run, 0))
        if config.algorithm.needs_critic and pretraining.num_prompts and pretraining.checkpoint is None:
            pretrain(run)
        save(run, 0, run.sampler.state())
    run.records.note(run.clock.told("ready"))
    return step


def restore(run: Run) -> int:
    """Loads the checkpoint that the run resumes from, if there is one. Returns the number of steps done."""
    if run.resume_from is None:
        return 0
    run.workers.load(run.resume_from)
    return checkpoint.read_state(run.resume_from).step


def evaluate_if_due(run: Run, steps_done: int) -> Evaluation | None:
    """Evaluates the policy every ``evaluation.every_steps`` steps, and after the last one."""
    config, every = run.config, run.config.evaluation.every_steps
    if not every or (steps_done % every and steps_done != config.steps):
        return None
    with run.clock.phase("evaluate"):
        return evaluate(run.heldout, run.workers.rollout, run.rewards, run.clock, config)


def record_evaluation(run: Run, steps_done: int, evaluated: Evaluation | None) -> None:
    """Records the evaluation of the policy after ``steps_done`` steps, if there was one."""
    if evaluated is not None:
        run.records.samples(steps_done, evaluated.rollouts, evaluated.rewards, evaluated.opens)
        run.records.log(steps_done, evaluated.metrics(), phase="evaluation")


def finish(
    run: Run, step: int, samples: StepSamples, result: StepResult, more: Metrics, evaluated: Evaluation | None = None
) -> None:
    """Records step ``step`` and the evaluation after it, and saves a checkpoint if one is due."""
    config, steps_done = run.config, step + 1
    run.records.rollouts(
        StepRecord(
            step=step,
            rollouts=samples.rollouts,
            rewards=samples.rewards,
            reasons=samples.reasons,
            opens=result.opens,
            scores=result.scores,
            targets=result.targets,
            monte_carlo_returns=result.returns,
            critic_values=result.critic_values,
        )
    )
    times = run.clock.lap()
    metrics = samples.metrics | result.metrics | more | times
    metrics |= throughput(result.opens.numel(), metrics, run.workers.num_gpus)
    metrics["data/epoch"] = float(samples.sampler["epoch"])
    if levels := samples.sampler["levels"]:
        metrics["data/level_mean"] = sum(levels) / len(levels)
    run.records.log(step, metrics)
    values, returns = result.scores.values, result.targets.returns
    for warning in run.watch.step(step, samples.rewards, samples.reasons, values, returns, metrics):
        run.records.note(warning)
    record_evaluation(run, steps_done, evaluated)
    # The checkpoint comes last: a resumed run drops exactly the records that are newer than its checkpoint.
    every = config.checkpoint.every_steps
    if steps_done == config.steps or (every and steps_done % every == 0):
        save(run, steps_done, samples.sampler)


def save(run: Run, steps_done: int, sampler: SamplerState) -> None:
    """Saves a checkpoint and removes the oldest ones."""
    with run.clock.phase("checkpoint"):
        state = checkpoint.DriverState(step=steps_done, sampler=sampler)
        checkpoint.save(run.checkpoints, state, run.workers, run.config.checkpoint.keep_last)
