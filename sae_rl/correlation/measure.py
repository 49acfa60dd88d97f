"""Measures estimators on a frozen policy: responses, continuations from places in them, advantages, gradients.

Work goes in parts, each of which ends as one file of ``folder/parts``. A second start reads those that are there, and ends
with the same bytes, since seeds derive from the run's seed and from names alone. Estimators see as many prompts at once as
a step of training has: thresholds that follow the batch, and budgets, mean what they mean there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from sae_rl.algo.estimators import estimate
from sae_rl.algo.segmentation import segment
from sae_rl.algo.value_sources import NO_LIMIT, MonteCarloValues
from sae_rl.config.schema import AlgorithmConfig, Config
from sae_rl.correlation.cost import Progress, spent
from sae_rl.correlation.files import RESPONSES, read_tensors, save, write_tensors
from sae_rl.correlation.measurements import Measurements, block_advantages, neutral_places, reference_values
from sae_rl.correlation.settings import CorrelationConfig, matched
from sae_rl.records.rollouts import SCORES, read_scored, write_scored
from sae_rl.rollouts.continuations import PolicyContinuations
from sae_rl.rollouts.groups import groups_of, sample
from sae_rl.run import Run
from sae_rl.seeds import derive_seed
from sae_rl.types import Batch, Rollout, Scores

PARTS, COST = "parts", "cost.json"
SAMPLED, CONTINUED, ADVANTAGES = (
    "responses_{:05d}.parquet",
    "returns_{:05d}.safetensors",
    "advantages_{:05d}.safetensors",
)
SAMPLING = "responses"  # a stage in cost.json
HELD = 4096  # continuations from the places of a prompt that memory holds at a time


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses to some prompts, each with what the networks compute from it."""

    rollouts: list[Rollout]
    rewards: list[float]
    reasons: list[str]
    scores: Scores

    @cached_property
    def batch(self) -> Batch:
        return Batch.of(self.rollouts, self.rewards)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured, with what, and where it is written.

    Args:
        algorithms: of each estimator by name, also of those in ``lacking``, whose segments alone are computed.
        lacking: names of estimators that need a critic, which this run lacks.
    """

    run: Run
    settings: CorrelationConfig
    algorithms: dict[str, AlgorithmConfig]
    lacking: Sequence[str]
    folder: Path

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.algorithms if name not in self.lacking)

    @property
    def strictest(self) -> Config:
        """The run's configuration with an estimator that compares the responses of a group, if there is one."""
        algorithms = [self.algorithms[name] for name in self.names]
        comparing = next((each for each in algorithms if each.compares_groups), self.run.config.algorithm)
        return self.run.config.model_copy(update={"algorithm": comparing})

    def part(self, name: str) -> Path:
        return self.folder / PARTS / name

    def cost(self, stage: str, what: str, num_parts: int) -> Progress:
        return Progress(self.part(COST), self.run.records.note, stage, what, num_parts)


def measure(measuring: Measuring) -> Measurements:
    """Measures everything, and writes it to ``measuring.folder``.

    Raises:
        RuntimeError: no engine is left, or too many checks failed. What is done is kept.
    """
    settings, steps = measuring.settings, sample_responses(measuring)
    algorithms, whole = _matched(measuring, steps), _joined(steps)
    opens = {
        name: torch.cat([segment(algorithm.segmenter, step.batch, step.scores) for step in steps])
        for name, algorithm in algorithms.items()
    }
    places = _places(settings, whole.batch, opens)
    _tell_cost(measuring, steps, whole.batch, places, opens)
    continued = _continued(measuring, whole, places)
    ends = accumulate((step.batch.num_tokens for step in steps), initial=0)
    advantages = torch.cat(
        [
            _advantages(measuring, i, step, algorithms, {name: flat[slice(*of_step)] for name, flat in opens.items()})
            for i, (step, of_step) in enumerate(zip(steps, pairwise(ends), strict=True))
        ],
        1,
    )
    overlong = measuring.run.config.algorithm.token_rewards.overlong(whole.batch)
    measurements = Measurements(
        batch=whole.batch,
        returns=(whole.batch.rewards - overlong).double(),
        places=places,
        neutral=torch.isin(places, neutral_places(whole.batch.lengths, settings.every)),
        continued=continued,
        names=measuring.names,
        advantages=advantages,
        opens=torch.stack([opens[name].float() for name in measuring.names]),
    )
    if settings.gradient_dimension:
        measurements = replace(measurements, gradients=_gradients(measuring, whole, measurements))
    write_scored(measuring.folder / RESPONSES, whole.rollouts, whole.rewards, whole.reasons, whole.scores)
    save(measurements, measuring.folder)
    return measurements


def sample_responses(measuring: Measuring) -> list[Responses]:
    """The responses to as many prompts at a time as a step of training has.

    Raises:
        RuntimeError: too many checks failed, so that no group is left.
    """
    run, size = measuring.run, measuring.run.config.rollout.prompts_per_step
    prompts = run.heldout[: measuring.settings.num_prompts]
    chunks = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    cost, found = measuring.cost(SAMPLING, "steps", len(chunks)), []
    for number, chunk in enumerate(chunks):
        file = measuring.part(SAMPLED.format(number))
        if not file.exists():
            started = time.perf_counter()
            rollouts, rewards = sample(
                chunk,
                run.workers.rollout,
                run.rewards,
                run.clock,
                group_size=run.config.rollout.group_size,
                sampling=run.config.rollout.sampling(run.config.rollout.max_response_tokens),
                seed_name="correlate",
            )
            seconds = time.perf_counter() - started
            kept = [group for group in groups_of(measuring.strictest, rollouts, rewards) if group.rollouts]
            if not kept:
                raise RuntimeError(f"too many of {len(rollouts)} checks failed, the first: {rewards.failures[0]}")
            rollouts = [rollout for group in kept for rollout in group.rollouts]
            scores = [reward for group in kept for reward in group.rewards]
            reasons = [reason for group in kept for reason in group.reasons]
            write_scored(file, rollouts, scores, reasons, run.workers.score_all(Batch.of(rollouts, scores)))
            cost.add(number + 1, sum(rollout.token_ids.numel() for rollout in rollouts), seconds)
        rollouts, scores, reasons, read = read_scored(file)
        found.append(Responses(rollouts=rollouts, rewards=scores, reasons=reasons, scores=read))
    return found


def _matched(measuring: Measuring, steps: Sequence[Responses]) -> dict[str, AlgorithmConfig]:
    """The algorithms, with the rates of those that they are matched to."""
    found = dict(measuring.algorithms)
    for name, other in measuring.settings.matched_to.items():
        if name not in found:
            continue  # left out
        segmenter = measuring.algorithms[other].segmenter
        inner = [segment(segmenter, s.batch, s.scores).sum() - s.batch.num_responses for s in steps]
        places = sum(s.batch.num_tokens - s.batch.num_responses for s in steps)
        found[name] = matched(found[name], float(sum(inner)) / max(1, places))
    return found


def _joined(steps: Sequence[Responses]) -> Responses:
    def all_of(name: str) -> Tensor | None:
        flat = [getattr(step.scores, name) for step in steps]
        return None if flat[0] is None else torch.cat(flat)

    return Responses(
        rollouts=[rollout for step in steps for rollout in step.rollouts],
        rewards=[reward for step in steps for reward in step.rewards],
        reasons=[reason for step in steps for reason in step.reasons],
        scores=Scores(**{name: all_of(name) for name in SCORES}),  # type: ignore[arg-type]
    )


def _places(settings: CorrelationConfig, batch: Batch, opens: Mapping[str, Tensor]) -> Tensor:
    """(P,) the neutral places, and where segments of ``settings.boundaries`` open."""
    boundaries = [(opens[name] >= 0.5).nonzero().flatten() for name in settings.boundaries]
    places: Tensor = torch.cat([neutral_places(batch.lengths, settings.every), *boundaries]).unique()
    return places


def _prompts(batch: Batch) -> list[tuple[int, slice, slice]]:
    """Number, responses and tokens of each prompt."""
    ends = batch.groups.bincount().cumsum(0).tolist()
    tokens = batch.offsets.tolist()
    return [
        (number, slice(first, end), slice(tokens[first], tokens[end]))
        for number, (first, end) in enumerate(pairwise([0, *ends]))
    ]


def _tell_cost(
    measuring: Measuring, steps: Sequence[Responses], batch: Batch, places: Tensor, opens: Mapping[str, Tensor]
) -> None:
    """Says what continuations will cost, if a place's are as long as the rest of its own response."""
    settings, sampled = measuring.settings, spent(measuring.part(COST), SAMPLING)
    left = batch.offsets[1:].repeat_interleave(batch.lengths) - torch.arange(batch.num_tokens)
    of_values = left.index_fill(0, batch.offsets[:-1], 0)  # `MonteCarloValues` measures no first token
    todo = torch.zeros(batch.num_tokens, dtype=torch.bool)
    for number, _, tokens in _prompts(batch):
        todo[tokens] = not measuring.part(CONTINUED.format(number)).exists()
    at = places[todo[places]]
    total, lines = settings.k * int(left[at].sum()), [f"{at.numel():,} places x {settings.k}"]
    for name in measuring.names:
        source = measuring.algorithms[name].value_source
        if not isinstance(source, MonteCarloValues):
            continue
        for number, step in enumerate(steps):
            if not measuring.part(ADVANTAGES.format(number)).exists():
                first = sum(each.batch.num_tokens for each in steps[:number])
                own = slice(first, first + step.batch.num_tokens)
                needed = source.k * int(of_values[own][opens[name][own] > 0].sum())
                total += needed if source.budget_tokens is None else min(needed, source.budget_tokens)
        lines.append(f"the values of {name}")
    minutes = total * sampled.seconds / max(1, sampled.tokens) / 60
    speed = sampled.tokens / max(1e-9, sampled.seconds)
    told = f"continuations of {' and '.join(lines)}: about {total:,} tokens, {minutes:.1f} min"
    measuring.run.records.note(f"{told} at {speed:,.0f} tokens/s, the speed of the responses")


def _continued(measuring: Measuring, whole: Responses, places: Tensor) -> Tensor:
    """(P, k) returns of continuations from each place."""
    run, k, prompts = measuring.run, measuring.settings.k, _prompts(whole.batch)
    cost, found = measuring.cost("continuations", "prompts", len(prompts)), []
    for number, responses, tokens in prompts:
        file = measuring.part(CONTINUED.format(number))
        if not file.exists():
            started, own = time.perf_counter(), whole.rollouts[responses]
            at = places[(places >= tokens.start) & (places < tokens.stop)] - tokens.start
            everywhere = torch.ones(tokens.stop - tokens.start, dtype=torch.bool)
            sampler = PolicyContinuations(run, own, everywhere, "correlate reference")
            pieces = [sampler(piece, k, NO_LIMIT) for piece in at.split(max(1, HELD // k))]
            write_tensors(file, {"continued": torch.cat(pieces)})
            sampled = int(sampler.metrics()["values/continuation_tokens"])
            cost.add(number + 1, sampled, time.perf_counter() - started)
        found.append(read_tensors(file)[0]["continued"])
    return torch.cat(found)


def _advantages(
    measuring: Measuring,
    number: int,
    step: Responses,
    algorithms: Mapping[str, AlgorithmConfig],
    opens: Mapping[str, Tensor],
) -> Tensor:
    """(E, n) advantages on the responses of one step, whose segments are ``opens`` (n,) by estimator."""
    file = measuring.part(ADVANTAGES.format(number))
    if not file.exists():
        rows = []
        for name in measuring.names:
            algorithm, own = algorithms[name], opens[name]
            token_rewards = algorithm.token_rewards(step.batch, step.scores)
            continuations = PolicyContinuations(measuring.run, step.rollouts, own, f"correlate estimator {name}")
            scores = algorithm.with_values(step.batch, step.scores, token_rewards, own, continuations)
            rows.append(estimate(algorithm.estimator, step.batch, scores, token_rewards, own).advantages.double())
        write_tensors(file, {"advantages": torch.stack(rows)})
    return read_tensors(file)[0]["advantages"]


def _gradients(measuring: Measuring, whole: Responses, measurements: Measurements) -> Tensor:
    """(E + 1, G, D), see `Measurements.gradients`. A block of tokens whose value is unknown has advantage 0."""
    run, prompts = measuring.run, _prompts(whole.batch)
    blocks = block_advantages(measurements, reference_values(measurements)).nan_to_num(0.0)
    advantages = torch.cat([measurements.advantages, blocks[None]])
    seed = derive_seed(run.config.seed, "projection")
    cost, found = measuring.cost("gradients", "prompts", len(prompts)), []
    for number, responses, tokens in prompts:
        file = measuring.part(f"gradients_{number:05d}.safetensors")
        if not file.exists():
            started, batch = time.perf_counter(), Batch.of(whole.rollouts[responses], whole.rewards[responses])
            gradients = run.workers.policy_gradients(
                batch, advantages[:, tokens], dimension=measuring.settings.gradient_dimension, seed=seed
            )
            write_tensors(file, {"gradients": gradients})
            cost.add(number + 1, batch.num_tokens, time.perf_counter() - started)
        found.append(read_tensors(file)[0]["gradients"])
    return torch.stack(found, 1)
