"""Every metric: its name, unit and meaning in one table, which the console, the report and the docs read.

A name is ``group/what_stat``. A new metric is one line here; `check_names` refuses to log a name that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["train", "pretraining", "evaluation"]


@dataclass(frozen=True, slots=True)
class Metric:
    """``unit``: empty for plain numbers; ``fraction`` is shown as a percentage."""

    unit: str
    meaning: str
    title: str = ""  # of its curve in the report and its place on the console; empty: in neither


METRICS: dict[str, Metric] = {
    # rollouts of the step
    "rollout/reward_mean": Metric("", "mean over responses of R(x, y)", "reward"),
    "rollout/reward_std": Metric("", "population standard deviation over responses of R(x, y)"),
    "rollout/tokens_mean": Metric("tokens", "mean length of a response", "response length"),
    "rollout/tokens_max": Metric("tokens", "longest response"),
    "rollout/truncated_fraction": Metric("fraction", "responses cut at the length limit", "truncated"),
    "rollout/overlong_penalty_mean": Metric("", "what responses near the length limit lost of their reward"),
    "rollout/zero_variance_fraction": Metric("fraction", "groups whose responses all have the same reward"),
    "rollout/staleness_mean": Metric("steps", "mean over tokens of the step that trains minus the one that sampled"),
    "rollout/staleness_max": Metric("steps", "the same of the oldest token"),
    "rollout/mixed_versions_fraction": Metric("fraction", "responses sampled by more than one version of the policy"),
    "rollout/num_lost_engines": Metric("", "rollout engines that were lost and replaced since the run began"),
    "reward/failed_fraction": Metric(
        "fraction", "checks without a verdict: they crashed, or overran their deadline or memory"
    ),
    "sampling/reward_mean": Metric("", "dynamic sampling: mean reward of all responses, also of groups left out"),
    "sampling/kept_fraction": Metric("fraction", "dynamic sampling: responses that the step trains on, of all sampled"),
    "sampling/num_rounds": Metric("", "dynamic sampling: rounds that the step took"),
    "sampling/left_over_fraction": Metric("fraction", "partial rollouts: groups that the step before began"),
    "data/epoch": Metric("", "passes over the prompts; of a mixture: over those of the part with the fewest"),
    "data/level_mean": Metric("", "mean over curricula of the level that the next prompts come from"),
    # segments
    "segment/per_response_mean": Metric("", "segments / responses", "segments per response"),
    "segment/tokens_mean": Metric("tokens", "response tokens / segments", "segment length"),
    "segment/opens_fraction": Metric(
        "fraction", "tokens that open a segment, of those that are not the first of a response", "tokens that open"
    ),
    "segment/tokens_p50": Metric("tokens", "median length of a segment"),
    "segment/tokens_p90": Metric("tokens", "length that nine of ten segments do not exceed"),
    "probability/below_p20_fraction": Metric("fraction", "tokens that were sampled with a probability below 0.2"),
    **{
        f"probability/bin_{k}_fraction": Metric(
            "fraction", f"tokens sampled with a probability in [0.{k}, {(k + 1) / 10})"
        )
        for k in range(10)
    },
    "advantage/mean": Metric("", "mean of A_t before whitening"),
    "advantage/std": Metric("", "population standard deviation of A_t before whitening"),
    # the rollout engine against the trainer
    "mismatch/logprob_abs_mean": Metric("nats", "mean over tokens of |log pi_rollout - log pi_old|"),
    "mismatch/logprob_abs_max": Metric("nats", "max over tokens of |log pi_rollout - log pi_old|"),
    "mismatch/kl_mean": Metric("nats", "KL(pi_rollout || pi_old) per token, by k3"),
    "sync/logprob_diff_max": Metric("nats", "largest |log pi_rollout - log pi_theta| on probes after a weight sync"),
    # the policy's update; means over the tokens of all optimizer updates of the step
    "policy/loss": Metric("", "what the policy minimised, per token"),
    "policy/clip_fraction": Metric("fraction", "tokens where the clip binds: clip(r) A < r A", "clipped"),
    "policy/clip_low_fraction": Metric("fraction", "tokens where the clip binds and A < 0"),
    "policy/clip_high_fraction": Metric("fraction", "tokens where the clip binds and A > 0"),
    "policy/approx_kl": Metric("nats", "KL(pi_old || pi_theta) per token, by k3", "approximate KL"),
    "policy/ratio_mean": Metric("", "mean of r = pi_theta / pi_old"),
    "policy/ref_kl": Metric("nats", "KL(pi_theta || pi_ref) per token, by the loss's estimator", "KL to the reference"),
    "policy/entropy_mean": Metric("nats", "mean entropy of pi_theta(. | s_t)", "entropy"),
    "policy/dual_clip_fraction": Metric("fraction", "tokens with A < 0 where the dual clip decides"),
    "policy/positive_nll": Metric("nats", "-log pi_theta at tokens of rewarded responses, over all tokens"),
    "correction/weight_mean": Metric("", "mean of the importance weight pi_old / pi_rollout, after the cap"),
    "correction/capped_fraction": Metric("fraction", "tokens whose importance weight was truncated or masked"),
    "policy/grad_norm": Metric("", "gradient norm before clipping, mean over updates"),
    "policy/lr": Metric("", "learning rate of the last update"),
    "policy/num_updates": Metric("", "optimizer updates of the step"),
    "policy/skipped_updates": Metric("", "of these, those that did nothing, since the gradient was not finite"),
    # the critic's update
    "critic/loss": Metric("", "what the critic minimised, per token"),
    "critic/clip_fraction": Metric("fraction", "tokens whose clipped error is the larger one"),
    "critic/value_mean": Metric("", "mean of V(s_t) during the update"),
    "critic/return_mean": Metric("", "mean of the critic's targets G_t"),
    "critic/explained_variance": Metric(
        "", "1 - Var(G - V) / Var(G) over tokens, before the update", "explained variance"
    ),
    "critic/explained_variance_starts": Metric("", "the same over the tokens that open a segment"),
    **{
        f"critic/explained_variance_decile_{k}": Metric("", f"the same over tokens in tenth {k + 1} of their response")
        for k in range(10)
    },
    "critic/grad_norm": Metric("", "gradient norm before clipping, mean over updates"),
    "critic/lr": Metric("", "learning rate of the last update"),
    "critic/num_updates": Metric("", "optimizer updates of the step"),
    "critic/skipped_updates": Metric("", "of these, those that did nothing, since the gradient was not finite"),
    # value pre-training; its step is the epoch
    "pretraining/epoch": Metric("", "passes over the rollouts of the frozen policy"),
    "pretraining/loss": Metric("", "what the critic minimised, per token of the epoch"),
    "pretraining/explained_variance": Metric("", "1 - Var(G - V) / Var(G) over tokens of held-out prompts"),
    "pretraining/train_explained_variance": Metric("", "the same over the tokens it trains on"),
    # held-out prompts, of all data sets; of several also each, see `metric_of`
    "evaluation/success_mean": Metric("", "avg@n: mean over prompts and n samples of the score", "held-out success"),
    "evaluation/success_low": Metric("", "lower end of its 95 % bootstrap interval over prompts"),
    "evaluation/success_high": Metric("", "upper end of its 95 % bootstrap interval over prompts"),
    "evaluation/pass_at_n_mean": Metric("", "pass@n: prompts with at least one sample that passes", "held-out pass@n"),
    "evaluation/pass_at_n_low": Metric("", "lower end of its 95 % bootstrap interval over prompts"),
    "evaluation/pass_at_n_high": Metric("", "upper end of its 95 % bootstrap interval over prompts"),
    "evaluation/maj_at_n_mean": Metric("", "maj@n: score of a prompt's most frequent answer", "held-out maj@n"),
    "evaluation/maj_at_n_low": Metric("", "lower end of its 95 % bootstrap interval over prompts"),
    "evaluation/maj_at_n_high": Metric("", "upper end of its 95 % bootstrap interval over prompts"),
    "evaluation/response_tokens_mean": Metric("tokens", "mean length of a response"),
    "evaluation/response_tokens_p50": Metric("tokens", "median length of a response"),
    "evaluation/response_tokens_p95": Metric("tokens", "length that 95 % of the responses do not exceed"),
    "evaluation/response_tokens_max": Metric("tokens", "longest response"),
    "evaluation/right_tokens_mean": Metric("tokens", "mean length of a response that passes"),
    "evaluation/wrong_tokens_mean": Metric("tokens", "mean length of one that does not"),
    "evaluation/truncated_fraction": Metric("fraction", "responses cut at the length limit"),
    "evaluation/failed_fraction": Metric("fraction", "checks that failed, and scored rewards.failed_score"),
    "evaluation/answered_fraction": Metric("fraction", "responses in which the verifier found an answer"),
    "evaluation/segments_per_response_mean": Metric("", "segments / responses, by the run's segmenter"),
    "evaluation/segment_tokens_mean": Metric("tokens", "response tokens / segments"),
    "evaluation/opens_fraction": Metric(
        "fraction", "tokens that open a segment, of those that are not the first of a response"
    ),
    "evaluation/num_prompts": Metric("", "held-out prompts"),
    "evaluation/samples_per_prompt": Metric("", "n of avg@n"),
    # wall time on the driver
    "time/generate_s": Metric("s", "sampling responses", "generate"),
    "time/reward_s": Metric("s", "checking responses", "reward"),
    "time/wait_s": Metric("s", "overlapped schedule: waiting for responses, of this step or the next", "wait"),
    "time/score_s": Metric("s", "values and logprobs before the update", "score"),
    "time/advantage_s": Metric("s", "segments, advantages and returns", "advantage"),
    "time/update_s": Metric("s", "optimizer updates of policy and critic", "update"),
    "time/policy_update_s": Metric("s", "part of update, by the slowest rank: the policy"),
    "time/critic_update_s": Metric("s", "part of update, by the slowest rank: the critic"),
    "time/sync_s": Metric("s", "sending weights to the rollout engines, and the probe", "sync"),
    "time/evaluate_s": Metric("s", "held-out prompts: sampling and checking", "evaluate"),
    "time/checkpoint_s": Metric("s", "saving, mostly the checkpoint of the step before", "checkpoint"),
    "time/driver_s": Metric("s", "step minus the phases above", "driver"),
    "time/step_s": Metric("s", "wall time since the last step ended", "step"),
    "ahead/generate_s": Metric("s", "overlapped schedule: sampling this step's responses, beside the phases above"),
    "ahead/reward_s": Metric("s", "overlapped schedule: checking them behind that"),
    "ahead/overlap": Metric(
        "", "all of these phases but waiting, / the wall time until the next weights were sent; 1: no overlap"
    ),
    "throughput/tokens_per_s": Metric("tokens/s", "response tokens / time/step_s", "tokens per second"),
    **{
        f"throughput/{phase}_tokens_per_s": Metric("tokens/s", f"response tokens / time/{phase}_s")
        for phase in ("generate", "score", "update")
    },
    **{
        f"throughput/{phase}tokens_per_s_per_gpu": Metric("tokens/s", "the same / GPUs of all workers")
        for phase in ("", "generate_", "score_", "update_")
    },
    **{
        name: metric
        for role in ("policy", "critic")
        for name, metric in {
            f"throughput/{role}_update_tflops": Metric(
                "TFLOP/s", f"model FLOPs of a rank's forward and backward passes / time/{role}_update_s"
            ),
            f"throughput/{role}_mfu": Metric("fraction", "the same / cluster.peak_tflops"),
            f"throughput/{role}_padding_fraction": Metric(
                "fraction",
                "positions of the update's passes that belong to no sequence, or to one run only to keep step",
            ),
        }.items()
    },
    "memory/policy_peak_gb": Metric("GiB", "peak memory of the largest rank"),
    "memory/critic_peak_gb": Metric("GiB", "peak memory of the largest rank"),
}

# Phases of a step that do not overlap and add up to time/step_s, in the order of the loop.
PHASES = tuple(n for n, m in METRICS.items() if n.startswith("time/") and m.title and n != "time/step_s")


EVALUATION = "evaluation/"


def metric_of(name: str) -> Metric | None:
    """The line of the table; None: it has none. ``evaluation/DATA SET/what`` means ``evaluation/what`` of one data set.

    The name of a data set may contain slashes, as those of hubs do.
    """
    if name not in METRICS and name.startswith(EVALUATION):
        data_set, _, what = name.removeprefix(EVALUATION).rpartition("/")
        name = EVALUATION + what if data_set else name
    return METRICS.get(name)


def data_set_of(name: str) -> str | None:
    """Of ``evaluation/DATA SET/what`` the data set; None: it is another metric, or of all data sets together."""
    if name in METRICS or not name.startswith(EVALUATION):
        return None
    return name.removeprefix(EVALUATION).rpartition("/")[0] or None


def check_names(names: Iterable[str]) -> None:
    """A name that the table lacks is a mistake of ours, so it asserts."""
    unknown = sorted(name for name in set(names) if metric_of(name) is None)
    assert not unknown, f"metrics without a line in sae_rl.records.metrics.METRICS: {', '.join(unknown)}"


def markdown_table() -> str:
    """The table for the docs."""
    rows = [f"| `{name}` | {m.unit or '-'} | {_escape(m.meaning)} |" for name, m in METRICS.items()]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows]) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def show(value: float, unit: str = "") -> str:
    """A number for people: three significant digits, thousands grouped, fractions as percentages."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else f"{value:g}"
    if unit == "fraction":
        return f"{100 * value:.1f} %"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.01 or size == 0:
        return f"{value:.3f}" if size < 1 else f"{value:.2f}"
    return f"{value:.1e}"
