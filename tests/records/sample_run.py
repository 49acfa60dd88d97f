"""A made-up run of the task Level whose policy gets better, written through `Records`."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import yaml

from sae_rl.algo.estimators import SAE
from sae_rl.algo.segmenters import LowProbability
from sae_rl.algo.shaping import TokenRewards
from sae_rl.algo.stats import explained_variance, mismatch_stats, rollout_stats, segment_stats
from sae_rl.analysis.viewer import Vocabulary
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config, as_tree
from sae_rl.records.records import Records
from sae_rl.tasks.level import Level
from sae_rl.types import Batch, Prompt, Rollout, Scores, StepRecord, Targets

LEVEL = Level()
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *LEVEL.words())
IDS = {word: i for i, word in enumerate(WORDS)}

SAE_OF_SAMPLES = "algorithm.estimator.lam=0.8"


def make_config(run_dir: Path, *overrides: str) -> Config:
    """All loggers are off; a test switches on those that it is about."""
    return load_config(
        [
            "name=sample",
            f"output_dir={run_dir}",
            "model.path=nobody/nothing",
            "model.context_tokens=1024",
            "logger=off",
            "logger.rollouts_every_steps=1",
            "algorithm.segmenter.p=0.3",
            *overrides,
        ]
    )


VOCABULARY = Vocabulary(decode=lambda ids: " ".join(WORDS[i] for i in ids), special_ids=frozenset({0, 1, 2, 3}))


def sample_rollout(prompt: Prompt, sample: int, step: int, skill: float, rng: random.Random) -> Rollout:
    """One demonstration with made-up probabilities: low where an action is chosen, near 1 elsewhere."""
    level = Level(random_fraction=1 - skill, temperature=4.0 - 3 * skill)
    text = level.demonstration(level.problem(0, "train", int(prompt.id.split("-")[1])), rng)
    words = [*text.split(), "<eos>"]
    probabilities = [
        rng.uniform(0.05, 0.3 + 0.7 * skill) if word.startswith("A") else 1 - 0.03 * rng.random() for word in words
    ]
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=torch.tensor([IDS[word] for word in words]),
        rollout_logprobs=torch.tensor(probabilities).log(),
        text=text,
        finish_reason="stop" if rng.random() < 0.95 else "length",
        policy_versions=torch.full((len(words),), step),
        temperature=1.0,
    )


def sample_step(step: int, num_prompts: int, skill: float, rng: random.Random) -> tuple[list[Rollout], list[float]]:
    rollouts, rewards = [], []
    for i in range(num_prompts):
        problem = LEVEL.problem(0, "train", 8 * step + i)
        prompt = Prompt(
            id=f"level-{8 * step + i}",
            text=problem.prompt,
            token_ids=tuple(IDS[word] for word in problem.prompt.split()),
            answer=problem.answer,
            task="level",
            reward="level",
        )
        for sample in range(2):
            rollouts.append(sample_rollout(prompt, sample, step, skill, rng))
            rewards.append(float(rng.random() < 0.15 + 0.75 * skill))
    return rollouts, rewards


def step_record(step: int, num_prompts: int, skill: float, rng: random.Random) -> StepRecord:
    rollouts, rewards = sample_step(step, num_prompts, skill, rng)
    batch = Batch.of(rollouts, rewards)
    scores, targets, opens = score(batch, skill)
    return StepRecord(
        step=step,
        rollouts=rollouts,
        rewards=rewards,
        reasons=[f"scores {reward:g}" for reward in rewards],
        opens=opens,
        scores=scores,
        targets=targets,
        monte_carlo_returns=batch.rewards.repeat_interleave(batch.lengths),
    )


def score(batch: Batch, skill: float) -> tuple[Scores, Targets, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.num_tokens, generator=generator)
    rewards = torch.repeat_interleave(batch.rewards, batch.lengths)
    drift = 0.1 * noise.cumsum(0) / math.sqrt(batch.num_tokens)
    scores = Scores(
        old_logprobs=batch.rollout_logprobs + 1e-3 * noise,
        values=0.25 + 0.5 * skill * rewards + drift + 0.03 * noise,
        ref_logprobs=None,
    )
    opens = LowProbability(p=0.3)(batch, scores)
    token_rewards = TokenRewards(kl_coef=0.0)(batch, scores)
    return scores, SAE(lam=0.8)(batch, scores, token_rewards, opens), opens


def write_sample_run(run_dir: Path, num_steps: int = 3, num_prompts: int = 2, every: int = 1) -> list[dict[str, float]]:
    """Writes metrics, rollouts, evaluations and a configuration. Returns the metrics of the training steps."""
    options = [f"steps={num_steps}", f"logger.rollouts_every_steps={every}", SAE_OF_SAMPLES]
    config = make_config(run_dir, *options)
    rng = random.Random(0)
    logged = []
    with Records(config, run_dir, first_step=0) as records:
        for step in range(num_steps):
            skill = 1 - math.exp(-3 * step / num_steps)
            record = step_record(step, num_prompts, skill, rng)
            batch, scores, targets = Batch.of(record.rollouts, record.rewards), record.scores, record.targets
            assert scores.values is not None and targets.returns is not None
            metrics = (
                rollout_stats(batch) | segment_stats(batch, record.opens) | mismatch_stats(batch, scores.old_logprobs)
            )
            metrics |= {
                "critic/explained_variance": explained_variance(scores.values, targets.returns),
                "policy/approx_kl": 2e-3 * rng.random() + 1e-3,
                "policy/clip_fraction": 0.02 + 0.02 * rng.random(),
                "policy/entropy_mean": 0.12 * (1 - skill) + 0.01 * rng.random(),
                **{f"time/{name}_s": s * rng.uniform(0.9, 1.1) for name, s in SECONDS.items()},
                "time/evaluate_s": 3.0 if step % 10 == 0 else 0.0,
            }
            metrics["time/step_s"] = sum(value for name, value in metrics.items() if name.startswith("time/"))
            metrics["throughput/tokens_per_s"] = batch.num_tokens / metrics["time/step_s"]
            records.rollouts(record)
            records.log(step, metrics)
            logged.append(metrics)
        _log_evaluations(records, num_steps)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(as_tree(config), sort_keys=False))
    return logged


SECONDS = {"generate": 4.1, "reward": 0.2, "score": 0.9, "advantage": 0.05, "update": 3.2, "sync": 0.8, "driver": 0.3}


def _log_evaluations(records: Records, num_steps: int) -> None:
    for step in sorted({0, *range(0, num_steps, 10), num_steps}):
        mean = 0.2109375 + 0.6 * (1 - math.exp(-3 * step / num_steps))
        metrics = {
            "evaluation/success_mean": mean,
            "evaluation/success_low": mean - 0.045,
            "evaluation/success_high": mean + 0.045,
            "evaluation/num_prompts": 256.0,
            "evaluation/samples_per_prompt": 2.0,
            "evaluation/response_tokens_mean": 258.4 - step / 10,
            "evaluation/truncated_fraction": 0.0117,
        }
        records.log(step, metrics, phase="evaluation")
