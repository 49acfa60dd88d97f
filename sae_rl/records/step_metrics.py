"""The metrics of one training step, beside those that the workers return."""

from __future__ import annotations

from torch import Tensor

from sae_rl.algo import stats
from sae_rl.algo.ragged import sampled_tokens
from sae_rl.config.schema import AlgorithmConfig
from sae_rl.records.metrics import PHASES
from sae_rl.types import Batch, Scores, Targets


def batch_metrics(
    algorithm: AlgorithmConfig,
    step: int,
    batch: Batch,
    scores: Scores,
    targets: Targets,
    opens: Tensor,
    logprobs: Tensor,
    values: Tensor | None,
    returns: Tensor | None,
) -> dict[str, float]:
    """Statistics of rollouts, segments (``opens`` (N,)), advantages before whitening, and the critic.

    Args:
        scores: with the critic's values.
        logprobs: (N,) the trainer's log pi_old; NaN where it is not known.
        values: (N,) that the advantages read; None: none.
        returns: (N,) Monte-Carlo returns; None: there is no critic.
    """
    metrics = stats.rollout_stats(batch) | stats.segment_stats(batch, opens) | stats.probability_stats(batch)
    metrics |= stats.staleness_stats(batch, step)
    metrics |= stats.advantage_stats(batch, targets.advantages) | stats.mismatch_stats(batch, logprobs)
    if algorithm.token_rewards.overlong_buffer_tokens:
        metrics["rollout/overlong_penalty_mean"] = float(algorithm.token_rewards.overlong(batch).mean())
    if scores.values is not None and targets.returns is not None:
        metrics |= stats.critic_stats(batch, scores.values, targets.returns, opens)
    if scores.values is not None and returns is not None:
        metrics |= stats.calibration_stats(scores.values, returns)
    if scores.value_spread is not None:
        metrics["values/spread_mean"] = float(sampled_tokens(scores.value_spread, batch).mean())
    if values is not None and values is not scores.values and targets.returns is not None:
        at = (opens > 0).nonzero().flatten()
        metrics["values/explained_variance"] = stats.explained_variance(values[at], targets.returns[at])
    return metrics


def throughput(num_tokens: int, times: dict[str, float], num_gpus: int) -> dict[str, float]:
    """Response tokens per second of the step and of its phases, and the same per GPU if the run has GPUs."""
    phases = {"": "time/step_s", "score_": "time/score_s", "update_": "time/update_s"}
    phases["generate_"] = "time/generate_s" if "time/generate_s" in times else "ahead/generate_s"
    rates = {
        f"throughput/{name}tokens_per_s": num_tokens / times[phase]
        for name, phase in phases.items()
        if times.get(phase)
    }
    return rates | ({f"{name}_per_gpu": rate / num_gpus for name, rate in rates.items()} if num_gpus else {})


def overlap(times: dict[str, float], sampled: dict[str, float]) -> dict[str, float]:
    """``ahead/overlap``: seconds of work of the driver and of the sampling thread, per second of wall time."""
    phases = sum(times[name] for name in PHASES if name in times) - times["time/wait_s"]
    return {"ahead/overlap": (phases + sampled["ahead/generate_s"] + sampled["ahead/reward_s"]) / times["time/step_s"]}
