"""Every figure of ``sae-rl correlate`` from its measurements, as a tree of names, numbers and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sae_rl.algo.ragged import positions
from sae_rl.correlation.agreement import Agreement, agreement, spearman
from sae_rl.correlation.fidelity import Fidelity
from sae_rl.correlation.intervals import NUM_RESAMPLES, estimates_of, resampled_counts
from sae_rl.correlation.measurements import Measurements
from sae_rl.correlation.references import Reference, segment_reference, token_reference
from sae_rl.evaluation.statistics import Estimate

BATCHES = (1, 4, 16, 64, 256, 1024)  # prompts
MIN_COVERED = 0.9  # an estimator's own segments are a reference if this fraction has values at both ends
PROBABILITIES = (0.2, 0.5, 0.9)  # where slices by the probability of sampled tokens end
MONTE_CARLO, GAE, SAE = "monte_carlo", "gae", "sae"  # names of estimators
BASELINES = (MONTE_CARLO, GAE)
# Estimators of the package that read no segments themselves, by their names in `ESTIMATORS`.
UNSEGMENTED = ("gae", "monte_carlo", "length_adaptive_gae", "grpo", "rloo", "tempo")
RANKED = 200  # resamples whose tokens are ranked: a million tokens take 2 s for each estimator
SLICED = {  # kinds of slices, in words
    "position": "position in the response, %",
    "tokens to the end": "tokens to the end of the response",
    "outcome": "outcome of the response",
    "probability": "probability of the token",
}
BY_SLICE = ("pearson", "pearson_corrected", "mean_error", "slope", "action_error")
COMPARED = ("pearson", "pearson_corrected", "spearman", "slope", "action_error", "cosine")

Tree = dict[str, Any]
Settings = Mapping[str, Mapping[str, Any]]  # by estimator, values by dotted key


def figures(
    measurements: Measurements,
    *,
    settings: Settings | None = None,
    segments_of: str | None = None,
    pass_score: float = 1.0,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Tree:
    """All figures; docs/correlation.md says what each means.

    Args:
        settings: of the estimators, for figures as functions of them.
        segments_of: the estimator whose segments give the paper's reference for all; None: "sae", if it is there.
        pass_score: a response with this reward or more is right.

    Raises:
        ValueError: no estimator has this name.
    """
    names, num_prompts = measurements.names, measurements.num_prompts
    known = {name: (settings or {}).get(name) or {} for name in names}  # an estimator without settings has an empty one
    if segments_of is not None and segments_of not in names:
        raise ValueError(f"segments_of is {segments_of!r}, allowed: {', '.join(names)}")
    segments_of = segments_of or (SAE if SAE in names else None)
    counts = resampled_counts(num_prompts, num_resamples, seed)
    baselines = baselines_of(names)
    references = {"token": token_reference(measurements)}
    if segments_of is not None:
        references["segment"] = segment_reference(measurements, measurements.opens[names.index(segments_of)])
    fidelity = None if measurements.gradients is None else Fidelity.of(measurements.gradients, counts)
    return {
        "num_prompts": num_prompts,
        "num_responses": measurements.batch.num_responses,
        "num_tokens": measurements.batch.num_tokens,
        "num_places": measurements.places.numel(),
        "continuations": measurements.continued.shape[1],
        "continuations_failed": float(measurements.continued.isnan().double().mean()),
        "num_resamples": num_resamples,
        "returns_differ": _returns_differ(measurements),
        "mean_return": float(measurements.returns.mean()),
        "segments_of": segments_of,
        "baselines": [names[index] for index in baselines],
        "estimators": {name: _about(measurements, e, known[name]) for e, name in enumerate(names)},
        "references": {
            name: _agreement_figures(measurements, reference, counts, baselines)
            for name, reference in references.items()
        },
        "own_segments": {
            name: _own_segments(measurements, e, counts) if has_segments(known[name]) else {}
            for e, name in enumerate(names)
        },
        "slices": _slice_figures(measurements, references["token"], counts, pass_score),
        "gradients": None if fidelity is None else _gradient_figures(fidelity, names, baselines, num_prompts),
        "families": families(names, settings or {}),
    }


def baselines_of(names: Sequence[str]) -> list[int]:
    """The estimators that all are compared with, by their names."""
    return [names.index(name) for name in BASELINES if name in names]


def families(names: Sequence[str], settings: Settings) -> dict[str, list[tuple[float, str]]]:
    """Estimators whose settings differ in one number: "segmenter.p as in sae" -> its (p, name), by p."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name, own in ((name, settings[name]) for name in names if name in settings):
        for key, value in own.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = str(sorted((other, own[other]) for other in own if other != key))
                found.setdefault((key, others), []).append((float(value), name))
    return {
        f"{key} as in {members[0][1]}": sorted(members)
        for (key, _), members in found.items()
        if len({value for value, _ in members}) > 1
    }


def has_segments(own: Mapping[str, Any]) -> bool:
    """Whether an estimator with these settings reads segments, itself or for its values."""
    return own.get("estimator.name") not in UNSEGMENTED or own.get("value_source.name") == "monte_carlo"


def _returns_differ(measurements: Measurements) -> bool:
    known = measurements.continued[~measurements.continued.isnan()]
    return bool((known != measurements.returns[0]).any() or (measurements.returns != measurements.returns[0]).any())


def _about(measurements: Measurements, e: int, own: Mapping[str, Any]) -> Tree:
    if not has_segments(own):
        return {"opens_fraction": math.nan, "segment_tokens": math.nan}
    rate = float(measurements.opens[e].double().mean())
    return {"opens_fraction": rate, "segment_tokens": 1 / rate if rate else math.nan}


def _rows(
    statistics: dict[str, Tensor], names: Sequence[str], baselines: Sequence[int], num_prompts: int
) -> dict[str, Tree]:
    """By estimator, each (R + 1, E) statistic, and its difference from the baselines on the same resamples."""
    rows: dict[str, Tree] = {name: {"minus": {names[b]: {} for b in baselines}} for name in names}
    for statistic, found in statistics.items():
        for name, estimate in zip(names, estimates_of(found, num_prompts), strict=True):
            rows[name][statistic] = estimate
        for b in baselines if statistic in COMPARED else ():
            for name, estimate in zip(names, estimates_of(found - found[:, b : b + 1], num_prompts), strict=True):
                rows[name]["minus"][names[b]][statistic] = estimate
    return rows


def _agreement_figures(
    measurements: Measurements, reference: Reference, counts: Tensor, baselines: Sequence[int]
) -> Tree:
    """Agreement with one reference; the token's or the paper's."""
    if not reference.tokens.numel():
        return {"tokens": 0, "covered": reference.covered}
    found = agreement(measurements, reference, counts)
    statistics = {name: getattr(found, name)[:, :, 0] for name in BY_SLICE}
    statistics["spearman"] = spearman(measurements, reference, counts[: RANKED + 1])
    num_prompts = counts.shape[1]
    return {
        "tokens": reference.tokens.numel(),
        "covered": reference.covered,
        "reliability": estimates_of(found.reliability, num_prompts)[0],
        "estimators": _rows(statistics, measurements.names, baselines, num_prompts),
    }


def _own_segments(measurements: Measurements, e: int, counts: Tensor) -> Tree:
    """Agreement with the paper's reference by the estimator's own segments, where those have values."""
    reference = segment_reference(measurements, measurements.opens[e])
    found: Tree = {"tokens": reference.tokens.numel(), "covered": reference.covered}
    if reference.covered < MIN_COVERED:
        return found
    alone = replace(measurements, advantages=measurements.advantages[e : e + 1])
    result, num_prompts = agreement(alone, reference, counts), counts.shape[1]
    found |= {name: estimates_of(getattr(result, name)[:, :, 0], num_prompts)[0] for name in BY_SLICE[:3]}
    return found | {"reliability": estimates_of(result.reliability, num_prompts)[0]}


def slices_of(
    measurements: Measurements, tokens: Tensor, pass_score: float = 1.0
) -> dict[str, tuple[Tensor, list[str]]]:
    """By what slices are: (n,) the slice of each token, and the slices' labels; by outcome where outcomes differ."""
    batch = measurements.batch
    response = torch.searchsorted(batch.offsets, tokens, right=True) - 1
    position, length = positions(batch.offsets)[tokens], batch.lengths[response]
    to_end = ((length - position).double().log2() + 1e-9).floor().long()  # 0, 1-2, 3-6, ... tokens follow
    distances = [(2**i - 1, 2 ** (i + 1) - 2) for i in range(int(to_end.max()) + 1)]
    is_right = batch.rewards >= pass_score
    outcomes = {"outcome": (1 - is_right[response].long(), ["right", "wrong"])}
    probability = torch.bucketize(batch.rollout_logprobs[tokens].exp().double(), torch.tensor(PROBABILITIES).double())
    ends = ["0", *map(str, PROBABILITIES), "1"]
    return {
        "position": (position * 10 // length, [f"{10 * i}-{10 * (i + 1)} %" for i in range(10)]),
        "tokens to the end": (to_end, [f"{a}-{b}" if a < b else f"{a}" for a, b in distances]),
        **(outcomes if is_right.any() and not is_right.all() else {}),
        "probability": (probability, [f"{a}-{b}" for a, b in pairwise(ends)]),
    }


def _slice_figures(measurements: Measurements, reference: Reference, counts: Tensor, pass_score: float) -> Tree:
    """By what slices are and by slice: the number of tokens, and the agreement with the token reference."""
    if not reference.tokens.numel():
        return {}
    trees: Tree = {}
    for kind, (slices, labels) in slices_of(measurements, reference.tokens, pass_score).items():
        sizes = slices.bincount(minlength=len(labels)).tolist()
        found = agreement(measurements, reference, counts, slices, len(labels))
        by_name = {name: _by_estimator(found, name, counts.shape[1]) for name in BY_SLICE}
        trees[kind] = [
            {
                "label": label,
                "tokens": sizes[s],
                "estimators": {
                    estimator: {name: by_name[name][e][s] for name in BY_SLICE}
                    for e, estimator in enumerate(measurements.names)
                },
            }
            for s, label in enumerate(labels)
        ]
    return trees


def _by_estimator(found: Agreement, name: str, num_prompts: int) -> list[list[Estimate]]:
    """[E][S]"""
    statistic: Tensor = getattr(found, name)
    return [estimates_of(statistic[:, e], num_prompts) for e in range(statistic.shape[1])]


def _gradient_figures(found: Fidelity, names: Sequence[str], baselines: Sequence[int], num_prompts: int) -> Tree:
    """Fidelity of the gradient, by estimator; by the batch's prompts where a figure depends on them."""
    statistics = {
        name: getattr(found, name) for name in ("length", "along", "cosine", "scale", "squared_bias", "variance")
    }
    rows = _rows(statistics, names, baselines, num_prompts)
    by_batch = {"norm": found.norm, "expected_cosine": found.expected_cosine, "squared_error": found.squared_error}
    if MONTE_CARLO in names:
        by_batch["worth"] = lambda n: found.worth(n, names.index(MONTE_CARLO))
    for statistic, of_batch in by_batch.items():
        columns = [estimates_of(of_batch(n), num_prompts) for n in BATCHES]
        for e, name in enumerate(names):
            rows[name][statistic] = [column[e] for column in columns]
    return {
        "batches": BATCHES,
        "reference_length": estimates_of(found.true_length, num_prompts)[0],
        "estimators": rows,
    }
