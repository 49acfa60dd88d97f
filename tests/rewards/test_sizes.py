"""The size of a number is told without evaluating it."""

from __future__ import annotations

import time

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_rl.rewards.math.expressions import is_too_large, latex
from sae_rl.rewards.math.formulas import digits
from sae_rl.rewards.table import READY
from sae_rl.rewards.verdict import Sample


@pytest.mark.parametrize(
    ("text", "num_digits"),
    [
        ("2^{2024}", 610),
        ("2^{-2024}", 610),
        (r"\frac{1}{2^{2024}}", 610),
        (r"3\cdot 2^{2024}", 610),
        (r"2^{2024}-1", 610),
        (r"\frac{1}{200!}", 376),
        ("1000!", 2569),
        ("e^{1000}", 435),
        (r"\binom{2024}{1012}", 608),
        (r"\sqrt{10^{300}+1}-10^{150}", 301),
        (r"(\frac{1+\sqrt{5}}{2})^{1000}", 210),
        (r"i^{2024}", 1),
        (r"1^{10^9}", 1),
    ],
)
def test_it_is_no_less_than_the_digits_there_are_and_not_far_above(text: str, num_digits: int) -> None:
    assert num_digits - 1 <= digits(latex(text), {}) <= 8 * num_digits + 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(-300, 300), st.sampled_from(["+", "*", "/", "-"]))
def test_it_is_a_bound(base: int, other: int, exponent: int, sign: str) -> None:
    formula = sympy.sympify(f"{base}**{exponent} {sign} {other}**{exponent}", evaluate=False)
    value = sympy.sympify(formula.doit())
    bound = digits(formula, {})
    for number in (value.p, value.q):
        assert value.has(sympy.zoo) or sympy.log(abs(number) or 1, 10).evalf() <= 2 * bound + 1e-9


@pytest.mark.parametrize(
    "text",
    [
        r"e^{e^{e^{e^{e}}}}",
        r"\exp(10^9)",
        r"\binom{10^9}{10^8}",
        r"\binom{1/2}{10^8}",
        r"\cosh(10^9)",
        r"\cos(10^9 i)",
        r"(10^9)!",
        r"\Gamma(10^9)",
        r"((9!)!)!",
        r"2^{10^9 i}",
        r"(1+\sqrt{2})^{10^9}",
        r"\ln(9^{9^9})",
        r"\lfloor e^{10^9} \rfloor",
        r"9^{-9^9}",
        r"(0, 9^{9^9})",
        "x^{10^9}",
    ],
)
def test_what_nobody_could_write_out_is_too_large_at_once(text: str) -> None:
    found = latex(text)
    started = time.perf_counter()
    assert is_too_large(found)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "(1+x)^{10}(1+y)^{10}(1+z)^{10}(a+b+c)^{10}",
        "((x+1)^5+(y+1)^6)^7",
        r"\begin{pmatrix}(1+x)^{10}(1+y)^{10}(1+z)^{10}(a+b+c)^{10}\end{pmatrix}",
        r"\{(1+x)^{10}(1+y)^{10}(1+z)^{10}(a+b+c)^{10}, 6\}",
        r"\frac{1}{(1+x)^{10}(1+y)^{10}(1+z)^{10}(a+b+c)^{10}}",
        r"(a+b+c+d)^{81/2}",
        r"\binom{10^9}{10^8}",
        r"e^{e^{e^{e^{e}}}}",
        r"\prod_{k=1}^{10^9} k",
        r"\sum_{k=1}^{100} 10^{k^4} + \frac12",
    ],
)
def test_what_would_take_long_is_wrong_at_once(text: str) -> None:
    READY["math"](Sample(prompt="", response=r"\boxed{\sqrt{x}}", answer="5"))  # imports
    started = time.perf_counter()
    assert READY["math"](Sample(prompt="", response=f"\\boxed{{{text}}}", answer="5")).score == 0.0
    assert time.perf_counter() - started < 2.0
