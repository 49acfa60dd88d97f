"""References, reliabilities, rank correlations and U-statistics against their definitions, as plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_rl.correlation.agreement import _position_means, agreement, spearman
from sae_rl.correlation.fidelity import Fidelity
from sae_rl.correlation.figures import baselines_of, families
from sae_rl.correlation.intervals import estimates_of, resampled_counts
from sae_rl.correlation.measurements import Measurements, neutral_places, reference_values
from sae_rl.correlation.references import segment_reference, token_reference, value_noise

from .made_up import made_up_batch

RAGGED = (5, 1, 7, 3, 9, 2)


def ragged(every: int, *, also: tuple[int, ...] = (), k: int = 4, action_mask: Tensor | None = None) -> Measurements:
    """Random measurements of responses of many lengths; ``also`` are places that are not neutral."""
    random = torch.Generator().manual_seed(every)
    batch = replace(made_up_batch(RAGGED), action_mask=action_mask)
    neutral = neutral_places(batch.lengths, every)
    places = torch.cat([neutral, torch.tensor(also, dtype=torch.int64)]).unique()
    return Measurements(
        batch=batch,
        returns=torch.rand(len(RAGGED), generator=random, dtype=torch.float64),
        places=places,
        neutral=torch.isin(places, neutral),
        continued=torch.rand(places.numel(), k, generator=random, dtype=torch.float64),
        names=("sae", "gae"),
        advantages=torch.randn(2, batch.num_tokens, generator=random, dtype=torch.float64),
        opens=(torch.rand(2, batch.num_tokens, generator=random) < 0.3).float(),
    )


def values_by_token(measurements: Measurements) -> dict[int, float]:
    values = measurements.continued.mean(1)
    return {int(place): float(value) for place, value in zip(measurements.places, values, strict=True)}


@pytest.mark.parametrize("every", [1, 3, 4])
def test_the_token_reference_is_that_of_pairs_of_neutral_places(every: int) -> None:
    measurements = ragged(every, also=(2, 8, 20))
    known, expected = values_by_token(measurements), {}
    neutral = set(measurements.places[measurements.neutral].tolist())
    for i, (begin, end) in enumerate(pairwise(measurements.batch.offsets.tolist())):
        for t in range(begin, end):
            is_second = every > 1 and t - 1 >= begin and t - 1 in neutral
            if t in neutral and t + 1 < end and t + 1 in neutral:
                expected[t] = known[t + 1] - known[t]
            elif t in neutral and t + 1 == end and not is_second:
                expected[t] = float(measurements.returns[i]) - known[t]
    reference = token_reference(measurements)
    found = reference.advantages(measurements, reference_values(measurements))
    assert reference.tokens.tolist() == [*expected] and found.tolist() == pytest.approx([*expected.values()])
    assert reference.covered == 1


def test_a_last_token_is_as_frequent_as_any_other() -> None:
    """Over many responses of one length: pairs begin at every position equally often, but for the first."""
    lengths = torch.full((60,), 7)
    places = neutral_places(lengths, 5)
    made = ragged(1)
    batch = replace(
        made.batch,
        offsets=torch.arange(61) * 7,
        token_ids=torch.zeros(420, dtype=torch.int32),
        groups=torch.zeros(60, dtype=torch.int64),
    )
    measurements = replace(
        made,
        batch=batch,
        places=places,
        neutral=torch.ones_like(places, dtype=torch.bool),
        returns=torch.zeros(60, dtype=torch.float64),
        continued=torch.rand(places.numel(), 2, dtype=torch.float64),
    )
    counts = (token_reference(measurements).tokens % 7).bincount(minlength=7)
    assert (
        counts[1:].tolist() == [12] * 6 and counts[0] == 24
    )  # phases 0 and 1, since the first token always is a place


def test_unknown_values_and_tokens_that_were_not_sampled_leave_the_reference() -> None:
    mask = torch.ones(sum(RAGGED), dtype=torch.bool)
    mask[7] = False
    measurements = ragged(1, action_mask=mask)
    measurements.continued[10, :] = torch.nan  # no value at token 10
    measurements.continued[15, 1:] = torch.nan  # one continuation, whose noise is not known
    tokens = token_reference(measurements).tokens.tolist()
    assert tokens == [t for t in range(sum(RAGGED)) if t not in (7, 9, 10, 14, 15)]
    opens = torch.zeros(sum(RAGGED)).index_fill(0, torch.tensor([8, 10]), 1.0)
    reference = segment_reference(
        measurements, opens
    )  # of the third response, tokens 6 to 12, only the first segment is known
    assert (
        not {8, 9, 10, 11, 12} & set(reference.tokens.tolist()) and 6 in reference.tokens and 7 not in reference.tokens
    )
    assert reference.covered == pytest.approx(6 / 8)


def test_the_noise_of_a_value_is_the_variance_of_its_mean() -> None:
    continued = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, torch.nan, 0.0, torch.nan], [1.0] + [torch.nan] * 3]).double()
    found = value_noise(continued)
    assert found[:2].tolist() == pytest.approx([np.var([1, 0, 1, 1], ddof=1) / 4, 0.25]) and found[2].isnan()


def test_the_reliability_is_that_of_all_split_halves() -> None:
    """The covariance of halves, averaged over all splits at both places, by Spearman and Brown."""
    measurements = ragged(1, k=4)
    reference = token_reference(measurements)
    splits = [(list(half), [i for i in range(4) if i not in half]) for half in combinations(range(4), 2)]
    extended = torch.cat([measurements.continued, measurements.returns[:, None].expand(-1, 4)])
    ends, begins = extended[reference.ends], extended[reference.begins]
    covariances = []
    for (a, b), (c, d) in product(splits, splits):
        one, other = (ends[:, x].mean(1) - begins[:, y].mean(1) for x, y in ((a, c), (b, d)))
        covariances.append(float((one * other).mean() - one.mean() * other.mean()))
    of_mean = reference.advantages(measurements, reference_values(measurements)).mean()
    shared = float(np.mean(covariances))
    # Means of halves differ, so the product of means has the noise of two halves; take the mean of all instead.
    shared += float(
        np.mean([
            float((ends[:, a].mean(1) - begins[:, c].mean(1)).mean() * (ends[:, b].mean(1) - begins[:, d].mean(1)).mean())
            for (a, b), (c, d) in product(splits, splits)
        ])
    ) - float(of_mean**2)  # fmt: skip
    found = agreement(measurements, reference, resampled_counts(3, 1))
    variance = float(reference.advantages(measurements, reference_values(measurements)).var(correction=0))
    half = shared / (2 * variance - shared)  # a half has noise 2 (variance - shared) and signal shared
    assert float(found.reliability[0, 0]) == pytest.approx(2 * half / (1 + half), rel=1e-12)


def test_correlation_and_bias_are_those_of_expanded_resamples() -> None:
    measurements, counts = ragged(1), resampled_counts(3, 5, seed=1)
    reference = token_reference(measurements)
    found = agreement(measurements, reference, counts)
    ranks = spearman(measurements, reference, counts)
    y = reference.advantages(measurements, reference_values(measurements)).numpy()
    noise = reference.noise(measurements).numpy()
    prompt = measurements.batch.groups.repeat_interleave(measurements.batch.lengths)
    for row, count in enumerate(counts):
        drawn = np.repeat(np.arange(y.size), count[prompt].long().numpy())
        true = y[drawn].var() - noise[drawn].mean()
        assert float(found.reliability[row, 0]) == pytest.approx(true / y[drawn].var())
        for e in range(2):
            x = measurements.advantages[e].numpy()[drawn]
            pearson = np.corrcoef(x, y[drawn])[0, 1]
            assert float(found.pearson[row, e, 0]) == pytest.approx(pearson)
            assert float(found.mean_error[row, e, 0]) == pytest.approx((x - y[drawn]).mean())
            if true > 0:
                corrected = pearson / math.sqrt(true / y[drawn].var())
                assert float(found.pearson_corrected[row, e, 0]) == pytest.approx(corrected)
            else:
                assert found.pearson_corrected[row, e, 0].isnan() and found.slope[row, e, 0].isnan()
            assert float(ranks[row, e]) == pytest.approx(np.corrcoef(mean_ranks(x), mean_ranks(y[drawn]))[0, 1])


def mean_ranks(numbers: np.ndarray) -> list[float]:
    return [float((numbers < one).sum() + (numbers <= one).sum()) / 2 for one in numbers]


def test_a_single_continuation_gives_no_reliability() -> None:
    measurements = ragged(1, k=1)
    found = agreement(measurements, token_reference(measurements), resampled_counts(3, 50))
    assert bool(found.reliability.isnan().all()) and bool(found.pearson_corrected.isnan().all())
    assert bool(found.pearson[0].isfinite().all())


def test_a_constant_advantage_has_no_correlation() -> None:
    measurements = ragged(1)
    constant = replace(measurements, advantages=torch.full_like(measurements.advantages, 0.3))
    found = agreement(constant, token_reference(constant), resampled_counts(3, 3))
    assert bool(found.pearson.isnan().all()) and bool(found.mean_error.isfinite().all())


def test_products_are_of_different_prompts_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    counts = resampled_counts(5, 4, seed=2)
    found = Fidelity.of(gradients, counts)
    for row, count in enumerate(counts.long().tolist()):
        drawn = [g for g in range(5) for _ in range(count[g])]
        for e in range(2):
            for statistic, other in ((found.length, gradients[e]), (found.along, gradients[2])):
                products = [float(gradients[e, g] @ other[h]) for g in drawn for h in drawn if g != h]
                assert float(statistic[row, e]) == pytest.approx(np.mean(products))
            squares = np.mean([float(gradients[e, g] @ gradients[e, g]) for g in drawn])
            assert float(found.spread[row, e]) == pytest.approx(squares - float(found.length[row, e]))


def test_batches_of_equal_cosine_are_worth_each_other() -> None:
    """m prompts of the baseline have the cosine of n prompts, and leave the same error at the best scale."""
    generator = torch.Generator().manual_seed(1)
    mu = torch.randn(1, 1, 6, generator=generator, dtype=torch.float64)
    noise = (
        torch.randn(4, 200, 6, generator=generator, dtype=torch.float64)
        * torch.tensor([2.0, 1.0, 3.0, 0.1])[:, None, None]
    )
    found = Fidelity.of(mu + noise, torch.ones(1, 200, dtype=torch.float64))
    n, worth = 16, Fidelity.of(mu + noise, torch.ones(1, 200, dtype=torch.float64)).worth(16, 0)
    for e in range(3):
        m = float(worth[0, e]) * n
        of_baseline = (
            found.along[0, 0] / (found.true_length[0, 0] * (found.length[0, 0] + found.spread[0, 0] / m)).sqrt()
        )
        assert float(of_baseline) == pytest.approx(float(found.expected_cosine(n)[0, e]))
        second_moment = found.length[0, e] + found.spread[0, e] / n
        scale = found.along[0, e] / second_moment
        error = found.true_length[0, 0] - 2 * scale * found.along[0, e] + scale**2 * second_moment
        expected = 1 - found.expected_cosine(n)[0, e] ** 2
        assert float(error / found.true_length[0, 0]) == pytest.approx(float(expected))
    assert float(worth[0, 0]) == pytest.approx(1) and worth[0, 1] > 1 > worth[0, 2]


def test_noise_that_hides_the_signal_leaves_a_figure_out() -> None:
    """Gradients of pure noise: |mu|^2 is as often negative as not, and no cosine is told."""
    generator, told = torch.Generator().manual_seed(2), 0
    counts = resampled_counts(40, 200)
    for _ in range(40):
        found = Fidelity.of(torch.randn(2, 40, 20, generator=generator, dtype=torch.float64), counts)
        (cosine,) = estimates_of(found.cosine, 40)
        told += not math.isnan(cosine.value)
        assert math.isnan(cosine.value) == math.isnan(cosine.low) == math.isnan(cosine.high)
    assert told <= 4


def test_a_figure_is_left_out_where_many_resamples_do_not_have_it() -> None:
    found = torch.linspace(0, 1, 400, dtype=torch.float64)
    found = torch.cat([torch.tensor([0.5]), found])[:, None].repeat(1, 3)
    found[5:15, 1] = torch.nan  # a fortieth of 400
    found[5:16, 2] = torch.nan
    full, few, many = estimates_of(found, 30)
    assert full.low < 0.05 < 0.95 < full.high and few.low < 0.07 and few.value == 0.5
    assert math.isnan(many.value) and math.isnan(many.low)
    assert math.isnan(estimates_of(found, 1)[0].low)


def test_estimators_whose_settings_differ_in_one_number_are_a_family() -> None:
    def own(p: float, lam: float, boundary: str) -> dict[str, object]:
        return {"segmenter.p": p, "segmenter.boundary": boundary, "estimator.lam": lam}

    settings = {
        "sae": own(0.2, 0.95, "opens"),
        "p30": own(0.3, 0.95, "opens"),
        "p10": own(0.1, 0.95, "opens"),
        "closes": own(0.2, 0.95, "closes"),
        "closes_lam": own(0.2, 0.5, "closes"),
        "lost": own(0.2, 0.4, "closes"),
        "switch": own(0.2, 0.95, "x") | {"flag": True},
        "other": own(0.2, 0.95, "x") | {"flag": False},
    }
    assert families([name for name in settings if name != "lost"], settings) == {
        "segmenter.p as in sae": [(0.1, "p10"), (0.2, "sae"), (0.3, "p30")],
        "estimator.lam as in closes": [(0.5, "closes_lam"), (0.95, "closes")],
    }
    assert families(["sae", "unknown"], {}) == {}


def test_baselines_are_known_by_their_names() -> None:
    assert baselines_of(["sae", "gae", "monte_carlo"]) == [2, 1] and baselines_of(["gae_matched"]) == []


def test_two_negative_squares_give_no_cosine() -> None:
    negative, along = torch.full((1, 1), -1.0), torch.full((1, 1), 0.5)
    assert Fidelity(length=negative, along=along, true_length=negative, spread=along).cosine.isnan().all()


def test_positions_of_many_tokens_have_quantiles() -> None:
    """Above 2^24 tokens, where torch.quantile stops."""
    position = torch.arange(2**24 + 20)
    found, sizes = _position_means(position.double()[None], position)[0].unique_consecutive(return_counts=True)
    middles = (torch.arange(20) + 0.5) / 20 * len(position)
    assert len(found) == 20 and (found - middles).abs().max() < 2 and (sizes - len(position) / 20).abs().max() < 2
