"""Numbers of every token of a recorded step: those that were recorded, and advantages that are computed from them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from torch import Tensor

from sae_rl.algo.estimators import ESTIMATORS, GAE, GRPO, SAE, Estimator, LengthAdaptiveGAE, MonteCarlo, estimate
from sae_rl.algo.segmentation import Segmenter, segment
from sae_rl.algo.segmenters import SEGMENTERS, LowProbability
from sae_rl.algo.shaping import TokenRewards
from sae_rl.types import Batch, Scores, offsets_of

Kind = Literal["logprob", "entropy", "value", "measured", "deviation", "advantage", "segments", "sampled"]
Tree = Mapping[str, Any]  # config.yaml, or a section of it


@dataclass(frozen=True, slots=True)
class Column:
    """A number for every token of a step."""

    kind: Kind
    label: str
    numbers: Tensor  # (N,), NaN where it is not known


@dataclass(frozen=True, slots=True)
class Compared:
    """An estimator whose advantages a page shows beside those of the run."""

    label: str
    estimator: Estimator
    segmenter: Segmenter | None  # None: it reads no segments


def columns_of(table: pa.Table, tree: Tree) -> tuple[list[Column], list[str]]:
    """The numbers of the rows of a whole step, and a sentence about each that cannot be computed again.

    Args:
        table: as `read_rollouts` returns it.
        tree: what the run's ``config.yaml`` holds.
    """
    name = tree.get("algorithm", {}).get("estimator", {}).get("name", "estimator")
    columns = recorded_columns(table, f"{name}, the run's own")
    try:
        algorithm = tree["algorithm"]
        computed, left_out = recompute(batch_of(table), table, algorithm, compared(algorithm))
    except (ValueError, TypeError, KeyError) as error:
        return columns, [f"No other estimator is shown: config.yaml is missing or of another version ({error!r})."]
    return [*columns, *computed], left_out


def recorded_columns(table: pa.Table, own: str) -> list[Column]:
    """The numbers that the rows hold; ``own`` is the label of the recorded advantages."""
    has_critic_values = flat(table, "critic_values") is not None
    recorded: list[tuple[Kind, str, str]] = [
        ("logprob", "log probability", "rollout_logprobs"),
        ("entropy", "entropy", "entropies"),
        ("value", "value of the value source" if has_critic_values else "value", "values"),
        ("value", "value of the critic", "critic_values"),
        ("value", "return", "returns"),
        ("advantage", own, "advantages"),
        ("segments", "the run's own segments", "opens"),
    ]
    columns = [Column(kind, label, found) for kind, label, name in recorded if (found := flat(table, name)) is not None]
    action_mask = flat(table, "action_mask")
    if action_mask is not None and not bool(action_mask.all()):
        columns.append(Column("sampled", "sampled by the policy", action_mask))
    return columns


def compared(algorithm: Tree) -> list[Compared]:
    """GAE, Monte Carlo, SAE with both boundaries, length-adaptive GAE and GRPO, without the run's own.

    Gamma is that of the run, unless it acts at segments. SAE has the run's lambda if the run's estimator is SAE, and the
    run's segmenter if that has a boundary.
    """
    own, marks = dict(algorithm["estimator"]), dict(algorithm["segmenter"])
    shared = {key: own[key] for key in ("gamma", "value_lam") if key in own and own["name"] != "segment_gae"}
    gamma = {"gamma": shared["gamma"]} if "gamma" in shared else {}
    lam = {"lam": own["lam"]} if own["name"] == "sae" else {}
    sae, low = SAE(**lam, **shared), LowProbability()
    segmenter = _member(SEGMENTERS, marks)
    marker = segmenter if segmenter is not None and "boundary" in marks else low
    at = f"p {marker.p:g}" if isinstance(marker, LowProbability) else marks["name"]
    members = [
        Compared("GAE, lambda 0.95", GAE(lam=0.95, **shared), None),
        Compared("Monte Carlo", MonteCarlo(**gamma), None),
        *(
            Compared(f"SAE, {boundary}, {at}, lambda {sae.lam:g}", sae, replace(marker, boundary=boundary))  # type: ignore[type-var]
            for boundary in ("opens", "closes")
        ),
        Compared("length-adaptive GAE", LengthAdaptiveGAE(**shared), None),
        Compared("GRPO", GRPO(), None),
    ]
    mine = _member(ESTIMATORS, own)
    return [each for each in members if each.estimator != mine or each.segmenter not in (None, segmenter)]


def _member(members: Mapping[str, Any], section: Tree) -> Any:
    """The object that a section of ``config.yaml`` describes; None for a user's class, and for one made of others."""
    knobs = {name: value for name, value in section.items() if name != "name"}
    if section["name"] not in members or any(isinstance(value, dict | list) for value in knobs.values()):
        return None
    return members[section["name"]](**knobs)


def recompute(
    batch: Batch, table: pa.Table, algorithm: Tree, members: list[Compared]
) -> tuple[list[Column], list[str]]:
    """Advantages of the whole step by every estimator, the segments of each segmenter, and what is left out and why."""
    token_rewards, values = TokenRewards(**algorithm["token_rewards"]), flat(table, "values")
    scores = Scores(
        old_logprobs=flat(table, "old_logprobs") if token_rewards.kl_coef else None,
        values=values,
        ref_logprobs=flat(table, "ref_logprobs"),
        entropies=flat(table, "entropies"),
        final_values=_final_values(table),
    )
    try:
        rewards = token_rewards(batch, scores)
    except ValueError as error:
        return [], [f"No other estimator is shown: {error}."]
    columns, left_out = list[Column](), list[str]()
    is_cut_off = algorithm["bootstrap_truncated"] and scores.final_values is None and bool(batch.truncated.any())
    if values is None or is_cut_off:
        lacking = "values" if values is None else "values after the last token of truncated responses"
        labels = "; ".join(each.label for each in members if each.estimator.needs_critic)
        left_out = [f"The step was recorded without {lacking}, so these are left out: {labels}."]
        members = [each for each in members if not each.estimator.needs_critic]
    for each in members:
        try:
            opens = torch.ones(batch.num_tokens, dtype=torch.bool)
            if each.segmenter is not None:
                opens = segment(each.segmenter, batch, scores)
                columns.append(Column("segments", f"segments of {each.label}", opens))
            columns.append(
                Column("advantage", each.label, estimate(each.estimator, batch, scores, rewards, opens).advantages)
            )
        except ValueError as error:
            left_out.append(f"{each.label} is left out: {error}.")
    return columns, left_out


def batch_of(table: pa.Table) -> Batch:
    """The batch of a recorded step."""
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(prompt, len(numbers)) for prompt in table["prompt_id"].to_pylist()]
    action_mask, prompts = flat(table, "action_mask"), flat(table, "prompt_token_ids")
    ids, logprobs, versions = (flat(table, name) for name in ("token_ids", "rollout_logprobs", "policy_versions"))
    assert action_mask is not None and ids is not None and logprobs is not None
    return Batch(
        prompt_token_ids=torch.zeros(0, dtype=torch.int32) if prompts is None else prompts,
        prompt_offsets=offsets_of(_lengths(table, "prompt_token_ids")),
        token_ids=ids,
        offsets=offsets_of(_lengths(table, "token_ids")),
        rollout_logprobs=logprobs,
        policy_versions=torch.zeros_like(ids) if versions is None else versions,
        rewards=torch.tensor(table["reward"].to_pylist(), dtype=torch.float32),
        groups=torch.tensor(groups),
        truncated=torch.tensor([reason == "length" for reason in table["finish_reason"].to_pylist()]),
        temperature=1.0,
        action_mask=None if bool(action_mask.all()) else action_mask.bool(),
    )


def _lengths(table: pa.Table, name: str) -> list[int]:
    return list(pc.list_value_length(table[name]).to_pylist())


def flat(table: pa.Table, name: str) -> Tensor | None:
    """The numbers of all lists of a column, one after another; None where they were not recorded."""
    if name not in table.column_names or table[name].null_count:
        return None
    return torch.tensor(pc.list_flatten(table[name]).to_numpy())


def _final_values(table: pa.Table) -> Tensor | None:
    known = "final_value" in table.column_names and not table["final_value"].null_count
    return torch.tensor(table["final_value"].to_pylist()) if known else None
