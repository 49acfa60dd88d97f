"""The page of responses holds the recorded numbers, and advantages as the estimators give them on the whole step."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sae_rl.algo.estimators import GAE, SAE, LengthAdaptiveGAE, MonteCarlo
from sae_rl.algo.segmenters import LowProbability
from sae_rl.algo.shaping import TokenRewards
from sae_rl.analysis import viewer
from sae_rl.analysis.step_columns import compared, recompute
from sae_rl.analysis.viewer import Viewed, chosen, packed, page_data, view_of_step
from sae_rl.commands.view import view_of_measurements
from sae_rl.config.schema import as_tree
from sae_rl.records.rollouts import read_rollouts, write_rollouts
from sae_rl.types import Batch, Scores, StepRecord
from tests.correlation.made_up import made_up_measurements

from .page_data import numbers_of, texts_of
from .sample_run import SAE_OF_SAMPLES, VOCABULARY, WORDS, make_config, step_record

ROUNDED = {"rel": 2**-12 * 1.01, "abs": 1e-30}


def record_of(step: int = 1, num_prompts: int = 3) -> StepRecord:
    return step_record(step, num_prompts, 0.5, random.Random(3))


def tree_of(folder: Path, *overrides: str) -> dict[str, Any]:
    return dict(yaml.safe_load(yaml.safe_dump(as_tree(make_config(folder, *overrides)))))


def viewed_step(folder: Path, record: StepRecord, *overrides: str) -> Viewed:
    return view_of_step(read_rollouts(write_rollouts(folder, record)), tree_of(folder, *overrides or (SAE_OF_SAMPLES,)))


def by_label(viewed: Viewed) -> dict[str, Tensor]:
    return {column.label: column.numbers for column in viewed.columns}


def batch_and_scores(record: StepRecord) -> tuple[Batch, Scores, Tensor]:
    batch = Batch.of(record.rollouts, record.rewards)
    return batch, record.scores, TokenRewards(kl_coef=0.0)(batch, record.scores)


def test_advantages_are_the_estimators_on_the_whole_step(tmp_path: Path) -> None:
    record = record_of()
    batch, scores, rewards = batch_and_scores(record)
    closes = LowProbability(p=0.3, boundary="closes")(batch, scores)
    pairs = torch.tensor(record.rewards).reshape(-1, 2)
    halves = (pairs - pairs.flip(1)) / 2  # of a group of two: R - mean, and std = |R_1 - R_2| / sqrt(2)
    in_groups = halves / (math.sqrt(2) * halves.abs() + 1e-6)
    expected = {
        "GAE, lambda 0.95": GAE(lam=0.95)(batch, scores, rewards, record.opens).advantages,
        "Monte Carlo": MonteCarlo()(batch, scores, rewards, record.opens).advantages,
        "SAE, closes, p 0.3, lambda 0.8": SAE(lam=0.8)(batch, scores, rewards, closes).advantages,
        "length-adaptive GAE": LengthAdaptiveGAE()(batch, scores, rewards, record.opens).advantages,
        "GRPO": in_groups.flatten().repeat_interleave(batch.lengths),
        "sae, the run's own": record.targets.advantages,
    }
    viewed = viewed_step(tmp_path, record)
    found = {column.label: column.numbers for column in viewed.columns if column.kind == "advantage"}
    assert found.keys() == expected.keys() and viewed.notes == []
    for label, advantages in expected.items():
        torch.testing.assert_close(found[label], advantages, rtol=1e-6, atol=1e-7)
    assert float(in_groups.abs().max()) > 0.5, "a group of different rewards"
    segments = by_label(viewed)
    assert torch.equal(segments["segments of SAE, closes, p 0.3, lambda 0.8"].bool(), closes)
    assert torch.equal(segments["the run's own segments"].bool(), record.opens)


def test_a_run_with_another_estimator_shows_sae_with_both_boundaries(tmp_path: Path) -> None:
    viewed = viewed_step(tmp_path, record_of(), "algorithm=monte_carlo", "algorithm.segmenter.p=0.4")
    labels = [column.label for column in viewed.columns if column.kind == "advantage"]
    assert labels == [
        *("monte_carlo, the run's own", "GAE, lambda 0.95", "SAE, opens, p 0.4, lambda 0.95"),
        *("SAE, closes, p 0.4, lambda 0.95", "length-adaptive GAE", "GRPO"),
    ]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_the_runs_own_estimator_gives_what_was_recorded(tmp_path: Path, kl: float) -> None:
    """Also with a KL in the reward, with values after truncated responses, with gamma, and with tokens of a tool."""
    record = record_of()
    draw = torch.Generator().manual_seed(0)
    first = record.rollouts[0]
    mask = torch.arange(first.token_ids.numel()) % 5 != 1
    rollouts = [replace(first, action_mask=mask, finish_reason="length"), *record.rollouts[1:]]
    batch = Batch.of(rollouts, record.rewards)
    assert record.scores.old_logprobs is not None and batch.action_mask is not None
    scores = replace(
        record.scores,
        ref_logprobs=record.scores.old_logprobs - torch.rand(batch.num_tokens, generator=draw),
        final_values=torch.rand(batch.num_responses, generator=draw),
        entropies=torch.rand(batch.num_tokens, generator=draw),
    )
    opens = record.opens & batch.action_mask
    settings = [f"algorithm.token_rewards.kl_coef={kl}", "algorithm.bootstrap_truncated=true"]
    settings += ["algorithm.estimator.gamma=0.99", "algorithm.estimator.lam=0.7"]
    tree = tree_of(tmp_path, *settings)
    targets = SAE(lam=0.7, gamma=0.99)(batch, scores, TokenRewards(kl_coef=kl)(batch, scores), opens)
    recorded = replace(record, rollouts=rollouts, scores=scores, targets=targets, opens=opens)
    table = read_rollouts(write_rollouts(tmp_path, recorded))
    other = dict(tree["algorithm"]) | {"estimator": {"name": "grpo", "normalize_std": True}}
    same = replace(compared(other)[2], estimator=SAE(lam=0.7, gamma=0.99))
    assert same.segmenter == LowProbability(p=0.3)
    (_, column), notes = recompute(batch_from(table), table, tree["algorithm"], [same])
    torch.testing.assert_close(column.numbers, targets.advantages, rtol=1e-6, atol=1e-7)
    assert notes == []
    columns = by_label(view_of_step(table, tree))
    assert scores.entropies is not None and torch.equal(columns["entropy"], scores.entropies)
    assert torch.equal(columns["sampled by the policy"], batch.action_mask)
    without = table.drop_columns(["ref_logprobs", "final_value"])  # as of an earlier version
    notes = list(view_of_step(without, tree).notes)
    assert len(notes) == 1 and ("scores.ref_logprobs is None" if kl else "values after the last token") in notes[0]
    assert ("GRPO" in by_label(view_of_step(without, tree))) == (kl == 0)


def batch_from(table: Any) -> Batch:
    from sae_rl.analysis.step_columns import batch_of

    return batch_of(table)


def test_the_value_source_and_the_critic_have_columns_where_they_differ(tmp_path: Path) -> None:
    record = record_of()
    assert record.scores.values is not None
    labels = by_label(viewed_step(tmp_path, record))
    assert torch.equal(labels["value"], record.scores.values) and "value of the critic" not in labels
    both = by_label(viewed_step(tmp_path, replace(record, critic_values=record.scores.values + 1)))
    assert torch.equal(both["value of the value source"], record.scores.values)
    assert torch.equal(both["value of the critic"], record.scores.values + 1)


def test_what_cannot_be_computed_is_named(tmp_path: Path) -> None:
    record = record_of()
    no_values = replace(record, scores=replace(record.scores, values=None))
    viewed = viewed_step(tmp_path, no_values, "algorithm=grpo")
    assert viewed.notes == [
        "The step was recorded without values, so these are left out: GAE, lambda 0.95; Monte Carlo; "
        "SAE, opens, p 0.3, lambda 0.95; SAE, closes, p 0.3, lambda 0.95; length-adaptive GAE."
    ]
    alone = [i for i in range(len(record.rollouts)) if record.rollouts[i].sample == 0]
    rows = read_rollouts(write_rollouts(tmp_path, record)).take(alone)
    (note,) = view_of_step(rows, tree_of(tmp_path)).notes
    assert note.startswith("GRPO is left out: group 0 has 1 response")
    (note,) = view_of_step(rows, {}).notes
    assert note.startswith("No other estimator is shown: config.yaml is missing or of another version")


def test_the_page_holds_the_numbers_of_every_column(tmp_path: Path) -> None:
    record = record_of()
    viewed = viewed_step(tmp_path, record)
    batch = Batch.of(record.rollouts, record.rewards)
    data = json.loads(json.dumps(page_data(viewed, [1, 4], VOCABULARY, first=4)))
    assert [each["index"] for each in data["responses"]] == [1, 4] and (data["first"], data["total"]) == (4, 6)
    for each in data["responses"]:
        i = each["index"]
        start, end = batch.offsets[i : i + 2].tolist()
        numbers = numbers_of(data, each)
        assert numbers.keys() == by_label(viewed).keys() and len(numbers) == 11
        for column in viewed.columns:
            expected = column.numbers[start:end].double().tolist()
            assert numbers[column.label] == pytest.approx(expected, nan_ok=True, **ROUNDED), column.label
        assert texts_of(data, each) == [f" {WORDS[token]}" for token in batch.token_ids[start:end].tolist()]
        assert [data["texts"][piece] for piece in data["special"]] == [" <eos>"]
        assert (each["reward"], each["right"]) == (record.rewards[i], record.rewards[i] >= 1)
        assert each["id"] == f"{record.rollouts[i].prompt.id}/{record.rollouts[i].sample}"
        assert data["prompts"][each["prompt"]]["text"] == record.rollouts[i].prompt.text


def test_numbers_keep_twelve_bits_and_what_is_not_finite() -> None:
    from sae_rl.analysis.viewer import _rounded

    numbers = torch.tensor([1 + 2**-11, 1 + 2**-12 + 2**-20, -1e-30, 0.0, math.nan, math.inf, -math.inf, 3.0e38])
    expected = [1 + 2**-11, 1 + 2**-11, -1e-30, 0.0, math.nan, math.inf, -math.inf, 3.0e38]
    assert _rounded([numbers])[0].tolist() == pytest.approx(expected, nan_ok=True, rel=2**-12)
    assert _rounded([numbers])[0, :2].tolist() == expected[:2]
    draw = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert len(packed(_rounded([draw]))) < 0.65 * len(packed(draw.numpy())), "which is why they are rounded"


def test_the_group_asked_for_comes_first() -> None:
    record = record_of(num_prompts=4)
    import pyarrow as pa  # type: ignore[import-untyped]

    table = pa.table({"prompt_id": [rollout.prompt.id for rollout in record.rollouts]})
    viewed = Viewed(table=table, columns=[], notes=[], pass_score=1.0)
    assert (
        chosen(viewed, 3) == [0, 1, 2] and chosen(viewed, 3, first=5) == [0, 4, 5] and chosen(viewed, 1, first=5) == [5]
    )
    assert chosen(viewed, 100, first=5) == list(range(8))


def record_like(batch: Batch) -> StepRecord:
    """A record of the responses of a batch."""
    record = record_of(num_prompts=2)
    bounds = zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)
    rollouts = [
        replace(
            rollout,
            token_ids=batch.token_ids[a:b],
            rollout_logprobs=batch.rollout_logprobs[a:b],
            policy_versions=batch.policy_versions[a:b],
        )
        for rollout, (a, b) in zip(record.rollouts, bounds, strict=True)
    ]
    flat = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    scores = Scores(old_logprobs=flat, values=flat, ref_logprobs=None)
    targets = replace(record.targets, advantages=flat)
    return replace(
        record, rollouts=rollouts, scores=scores, targets=targets, opens=flat > 0.5, monte_carlo_returns=None
    )


def test_measurements_have_a_reference_with_its_error(tmp_path: Path) -> None:
    measured = made_up_measurements()
    record = record_like(measured.batch)
    found = by_label(view_of_measurements(measured, read_rollouts(write_rollouts(tmp_path, record)), {}))
    continued, place = measured.continued[1], int(measured.places[1])
    two = continued[~continued.isnan()]
    assert two.numel() == 2 and found["mean return of 3 continuations"][place] == two.mean()
    assert found["its standard error"][place] == pytest.approx(float(two.std() / math.sqrt(2)))
    elsewhere = torch.ones(measured.batch.num_tokens, dtype=torch.bool).index_fill(0, measured.places, False)
    assert bool(found["mean return of 3 continuations"][elsewhere].isnan().all())
    assert torch.equal(found["sae"], measured.advantages[0]) and torch.equal(
        found["segments of gae"], measured.opens[1]
    )
    assert record.scores.values is not None and torch.equal(found["value"], record.scores.values)
    assert "Monte-Carlo reference of blocks" in found and "the run's own segments" not in found


def luminance(colour: list[float]) -> float:
    """Relative luminance of WCAG 2.1."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_the_strongest_shade(scheme: str) -> None:
    """WCAG's 4.5 for text on the shades of tokens and in the panel, and 3 for lines of the charts."""
    css = Path(viewer.__file__).with_name("page.css").read_text()
    block = css.split(":root {")[1 if scheme == "light" else 2].split("}")[0]
    found = dict(re.findall(r"--([\w]+): #([0-9a-f]{6})", block))
    colours = {name: [int(text[i : i + 2], 16) / 255 for i in (0, 2, 4)] for name, text in found.items()}
    most = re.search(r"Math.round\((\d+) \* Math.min", Path(viewer.__file__).with_name("viewer.js").read_text())
    assert most is not None
    for shade in ("c1", "c2"):
        part = int(most[1]) / 100
        mixed = [part * a + (1 - part) * b for a, b in zip(colours[shade], colours["card"], strict=True)]
        assert contrast(colours["text"], mixed) >= 4.5, shade
    assert all(contrast(colours[name], colours["card"]) >= 4.5 for name in ("muted", "right", "wrong"))
    assert contrast(colours["muted"], colours["seg0"]) >= 4.5
    assert all(contrast(colours[name], colours["card"]) >= 3 for name in ("c1", "c2", "c3", "c4"))
