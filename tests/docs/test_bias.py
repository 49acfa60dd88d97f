"""The experiment behind docs/bias.md: the theorem holds on the chain, and the page has the numbers of the experiment."""

from __future__ import annotations

import math
import re
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "generate_bias.py"))


@pytest.fixture(scope="module")
def found(script: dict[str, Any]) -> list[Any]:
    chains = script["sample"](script["NUM_CHAINS"])
    return [script["measure"](chains, length) for length in script["LENGTHS"]]


def test_the_bias_falls_like_one_over_the_length_of_segments(script: dict[str, Any], found: list[Any]) -> None:
    assert -1.1 < script["slope"](found, "mean") < -0.85
    assert -1.3 < script["slope"](found, "first") < -1.0
    for shorter, longer in pairwise(found[:-1]):
        assert longer.first < shorter.first and longer.mean < shorter.mean
    gae, monte_carlo = found[0], found[-1]
    assert gae.first > 0.2 and abs(monte_carlo.first) < 1e-15 and abs(monte_carlo.mean) < 1e-15


def test_the_bias_lies_between_half_of_the_bound_and_the_bound(found: list[Any]) -> None:
    """The error of every state is between half of the envelope and the whole envelope."""
    for one in found:
        assert one.bound / 2 - 1e-12 <= one.first <= one.bound or one.bound < 1e-5


def test_the_bound_is_the_sum_over_boundaries(script: dict[str, Any]) -> None:
    lam, error, decay = script["LAM"], script["ERROR"], script["DECAY"]
    for length in (1, 8, 64):
        terms = [(1 - lam) * lam ** (k - 1) * error * math.exp(-decay * k * length) for k in range(1, 3000)]
        assert script["bound"](length) == pytest.approx(sum(terms), rel=1e-9)
        assert script["bound"](length) <= error * (1 - lam) / (1 - lam + decay * length)


def test_an_exact_critic_is_unbiased_and_longer_segments_vary_more(found: list[Any]) -> None:
    for one in found:
        assert abs(one.exact) <= 4 * one.exact_error + 1e-9
    assert [one.std for one in found] == sorted(one.std for one in found)


NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def rounded_numbers(text: str) -> list[tuple[float, float]]:
    """All numbers of a text, each with one unit of its last digit."""
    found = NUMBER.findall(text)
    return [(float(number), 10.0 ** -len(number.partition(".")[2])) for number in found]


def test_the_page_has_the_text_and_the_numbers_of_the_experiment(script: dict[str, Any], found: list[Any]) -> None:
    """Numbers may differ by one unit of the last digit, because CPUs round differently; text and integers may not."""
    written, expected = (DOCS / "bias.md").read_text(), script["page"](found)
    assert NUMBER.sub("#", written) == NUMBER.sub("#", expected), "run make docs"
    for (one, unit), (other, _) in zip(rounded_numbers(written), rounded_numbers(expected), strict=True):
        assert abs(one - other) <= (1.001 * unit if unit < 1 else 0), f"{one} for {other}: run make docs"
