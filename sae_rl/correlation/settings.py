"""What ``sae-rl correlate`` measures: ``correlation`` in ``conf/correlate.yaml``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import PlainValidator

from sae_rl.algo.estimators import ESTIMATORS, GAE, Estimator
from sae_rl.algo.segmentation import Segmenter
from sae_rl.algo.segmenters import SEGMENTERS, AdaptiveProbability, Entropy, FixedLength, Random
from sae_rl.algo.value_sources import VALUE_SOURCES, CriticValues, ValueSource
from sae_rl.config.checks import check
from sae_rl.config.schema import AlgorithmConfig, Config
from sae_rl.config.trial import try_algorithm
from sae_rl.names import nearest
from sae_rl.settings import ConfigError, NonNegative, Positive, Section, member_of

T = TypeVar("T")
RESPONSES = "correlation.responses_per_prompt"  # what rollout.group_size is here


def _or_none(build: Callable[[object], object]) -> Callable[[object], object]:
    return lambda node: None if node is None else build(node)


class EstimatorConfig(Section):
    """One of the estimators that are compared, written as in ``conf/algorithm``."""

    segmenter: Annotated[Segmenter | None, PlainValidator(_or_none(member_of(SEGMENTERS)))] = None  # null: the run's
    value_source: Annotated[ValueSource, PlainValidator(member_of(VALUE_SOURCES, "needs_critic"))] = CriticValues()
    estimator: Annotated[Estimator, PlainValidator(member_of(ESTIMATORS, "needs_critic"))]
    matched_to: str | None = None  # another estimator, the rate of whose segments this one gets

    def algorithm(self, run: AlgorithmConfig) -> AlgorithmConfig:
        """The algorithm of a run with these parts."""
        parts = {"segmenter": self.segmenter or run.segmenter, "value_source": self.value_source}
        return run.model_copy(update=parts | {"estimator": self.estimator})


class CorrelationConfig(Section):
    checkpoint: Path | None  # null: the policy is model.path as it is
    num_prompts: Positive
    responses_per_prompt: Positive
    k: Positive  # continuations from each place
    every: Positive  # tokens from one neutral place to the next
    boundaries: tuple[str, ...]  # estimators whose segments begin and end at measured places
    gradient_dimension: NonNegative  # 0: no gradients
    estimators: dict[str, EstimatorConfig | None]  # null: left out

    @property
    def matched_to(self) -> dict[str, str]:
        """The name of an estimator -> that of the other whose rate it gets."""
        return {name: each.matched_to for name, each in self.estimators.items() if each and each.matched_to}


class CorrelateConfig(Section):
    """What ``conf/correlate.yaml`` has beside the keys of a run."""

    correlation: CorrelationConfig


def chosen(settings: CorrelationConfig, config: Config) -> tuple[dict[str, AlgorithmConfig], list[str]]:
    """The algorithm of each estimator.

    Returns:
        Algorithms by name, in order, and the names of those that need a critic, which this run lacks. Their segments can
        be computed all the same.

    Raises:
        ConfigError: a contradiction within an estimator, a name that no estimator has, or none is left.
    """
    own = config.algorithm
    found = {name: each.algorithm(own) for name, each in settings.estimators.items() if each is not None}
    lacking = [name for name, algorithm in found.items() if algorithm.needs_critic and not own.needs_critic]
    problems, known = [], {line for line in check(config) if not line.startswith("rollout.group_size")}
    if len(found) == len(lacking):
        problems.append("correlation.estimators: none is left that needs no critic, which this run lacks")
    for name, algorithm in found.items():
        if name in lacking:
            continue
        key = f"correlation.estimators.{name}"
        tried = config.model_copy(update={"algorithm": algorithm})
        broken = [line for line in (*check(tried), *try_algorithm(tried)) if line not in known]
        problems += [f"{key}: {line.replace('rollout.group_size', RESPONSES)}" for line in broken]
        if (gamma := getattr(algorithm.estimator, "gamma", 1.0)) != 1:
            problems.append(f"{key}.estimator.gamma = {gamma:g}: returns of continuations are undiscounted; use 1")
        if (num_critics := algorithm.num_critics) > own.num_critics:
            problems.append(f"{key} compares {num_critics} critics, but this run has {own.num_critics}")
    names = [("correlation.boundaries", name) for name in settings.boundaries]
    for name, other in settings.matched_to.items():
        key = f"correlation.estimators.{name}.matched_to"
        names.append((key, other))
        if other in settings.matched_to:
            problems.append(f"{key} = {other}, which is matched itself; name an estimator without matched_to")
        try:
            matched(found[name], 0.1)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    problems += [
        f"{key} = {name}: no estimator has this name, {nearest(name, found)}"
        for key, name in names
        if name not in found
    ]
    if problems:
        raise ConfigError(problems)
    return found, lacking


def matched(algorithm: AlgorithmConfig, rate: float) -> AlgorithmConfig:
    """The algorithm whose segmenter opens segments at this rate, and whose GAE looks as far ahead as SAE does then.

    A trace of GAE decays by ``lam ^ rate`` at each token, where one of SAE decays by lam at a fraction ``rate`` of them.

    Args:
        rate: the fraction of tokens that open a segment, first tokens left out.
    """
    segmenter, estimator = algorithm.segmenter, algorithm.estimator
    if type(estimator) is GAE:
        estimator = replace(estimator, lam=estimator.lam**rate)
    match segmenter:
        case Random():
            segmenter = replace(segmenter, rate=rate)
        case FixedLength():
            segmenter = replace(segmenter, num_tokens=max(1, round(1 / rate)) if rate else 2**31)
        case AdaptiveProbability():
            segmenter = replace(segmenter, opens_fraction=rate, segment_tokens=None)
        case Entropy():
            segmenter = replace(segmenter, opens_fraction=rate, threshold=None)
        case _ if type(estimator) is not GAE:
            raise ValueError(
                f"{type(segmenter).__name__} takes no rate; allowed: random, fixed_length, adaptive_probability, entropy, "
                "or the estimator gae"
            )
    return algorithm.model_copy(update={"segmenter": segmenter, "estimator": estimator})
