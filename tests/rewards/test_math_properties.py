"""A number equals itself however it is written, and no other number."""

from __future__ import annotations

import decimal
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.table import READY
from sae_rl.rewards.verdict import Sample

INTEGERS = st.integers(-(10**15), 10**15)
RATIONALS = st.fractions(-10_000, 10_000, max_denominator=997)
DECIMALS = st.decimals(-(10**9), 10**9, allow_nan=False, allow_infinity=False, places=4)
EXACT = Numeric(relative=0.0)
few = settings(max_examples=60, deadline=None)


def score(found: str, answer: str) -> float:
    """Of both verifiers, which must agree on numbers."""
    sample = Sample(prompt="", response=f"It is $\\boxed{{{found}}}$.", answer=answer)
    scores = [verifier(sample).score for verifier in (READY["math"], EXACT)]
    assert len(set(scores)) == 1, (found, answer, scores)
    return scores[0]


def of_integer(number: int) -> list[str]:
    sign = "-" if number < 0 else ""
    digits = str(abs(number))
    return [
        str(number),
        f"{number:,}",
        f"{number:,}".replace(",", "{,}"),
        f"{number:,}".replace(",", "\\,"),
        f"{number}.0",
        f"{number}.",
        f"{sign}00{digits}",
        f"{sign}\\${digits}" if not sign else str(number),
        f"x = {number}",
        f"{number}/1",
        f"{number} \\text{{ degrees}}",
        f"\\text{{{number}}}",
        f"{number}^\\circ",
        str(number).replace("-", "\u2212"),
        f"\\left({number}\\right)",
    ]


def of_rational(number: Fraction) -> list[str]:
    n, d = number.numerator, number.denominator
    sign = "-" if n < 0 else ""
    whole, rest = divmod(abs(n), d)
    return [
        f"{n}/{d}",
        f"\\frac{{{n}}}{{{d}}}",
        f"\\dfrac{{{3 * n}}}{{{3 * d}}}",
        f"{sign}\\tfrac{{{abs(n)}}}{{{d}}}",
        f"{sign}{whole}\\frac{{{rest}}}{{{d}}}",
        f"{sign}{whole} {rest}/{d}",
        f"\\frac{{{100 * n}}}{{{d}}}\\%",
        f"y=\\frac{{{n}}}{{{d}}}",
    ]


def of_decimal(number: Decimal) -> list[str]:
    mantissa, _, exponent = f"{number:.17e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    ratio = Fraction(number)
    return [
        f"{number}",
        f"{number}00",
        f"{number:,}",
        f"{mantissa} \\times 10^{{{int(exponent)}}}",
        f"{mantissa}e{int(exponent)}",
        f"\\frac{{{ratio.numerator}}}{{{ratio.denominator}}}",
        f"{number * 100}\\%",
    ]


@few
@given(INTEGERS, st.data())
def test_integers(number: int, data: st.DataObject) -> None:
    one, other = (data.draw(st.sampled_from(of_integer(number))) for _ in range(2))
    assume("$" not in one + other or not any(degrees in one + other for degrees in ("degrees", "circ")))  # two units
    assert score(one, other) == 1.0


@few
@given(RATIONALS, st.data())
def test_rationals(number: Fraction, data: st.DataObject) -> None:
    one, other = (data.draw(st.sampled_from(of_rational(number))) for _ in range(2))
    assert score(one, other) == 1.0


@few
@given(DECIMALS, st.data())
def test_decimals(number: Decimal, data: st.DataObject) -> None:
    one, other = (data.draw(st.sampled_from(of_decimal(number))) for _ in range(2))
    assert score(one, other) == 1.0


@few
@given(INTEGERS, INTEGERS, st.data())
def test_another_integer_never_scores(number: int, different: int, data: st.DataObject) -> None:
    assume(number != different)
    assert (
        score(data.draw(st.sampled_from(of_integer(different))), data.draw(st.sampled_from(of_integer(number)))) == 0.0
    )


@few
@given(INTEGERS, st.sampled_from([-1, 1]), st.data())
def test_its_neighbour_never_scores(number: int, step: int, data: st.DataObject) -> None:
    assert score(data.draw(st.sampled_from(of_integer(number + step))), str(number)) == 0.0


@few
@given(RATIONALS, RATIONALS, st.data())
def test_another_rational_never_scores(number: Fraction, different: Fraction, data: st.DataObject) -> None:
    assume(number not in (different, 100 * different))  # p % may also be p
    found = data.draw(st.sampled_from(of_rational(different)))
    assert score(found, f"{number.numerator}/{number.denominator}") == 0.0


@few
@given(DECIMALS, DECIMALS, st.data())
def test_another_decimal_never_scores(number: Decimal, different: Decimal, data: st.DataObject) -> None:
    assume(number not in (different, 100 * different))
    assert score(data.draw(st.sampled_from(of_decimal(different))), str(number)) == 0.0


@few
@given(st.integers(1, 99), st.integers(1, 99), st.integers(2, 99))
def test_a_mixed_number_is_not_its_digits_side_by_side(whole: int, top: int, bottom: int) -> None:
    mixed, run_together = f"{whole} {top}/{bottom}", f"{whole}{top}/{bottom}"
    assume(whole + Fraction(top, bottom) != Fraction(run_together))  # as 1 1/10 is 11/10
    assert score(mixed, run_together) == score(run_together, mixed) == 0.0


@few
@given(st.integers(1, 999), st.integers(2, 99), st.integers(0, 30))
def test_small_numbers_are_no_rounding_errors_of_each_other(n: int, d: int, zeros: int) -> None:
    """math-verify rounds to six places after the point."""
    small = f"\\frac{{{n}}}{{{d} \\cdot 10^{{{zeros}}}}}"
    other = f"\\frac{{{n + 1}}}{{{d} \\cdot 10^{{{zeros}}}}}"
    judge = READY["math"]
    assert judge(Sample(prompt="", response=f"\\boxed{{{small}}}", answer=small)).score == 1.0
    assert judge(Sample(prompt="", response=f"\\boxed{{{other}}}", answer=small)).score == 0.0
    pair = Sample(prompt="", response=f"\\boxed{{({other}, 1)}}", answer=f"({small}, 1)")
    assert judge(pair).score == 0.0


@few
@given(st.text(max_size=60))
def test_whatever_a_model_writes_is_judged(text: str) -> None:
    for response in (text, f"\\boxed{{{text}}}"):
        verdict = READY["math"](Sample(prompt="", response=response, answer="271828182845"))
        assert verdict.score == 0.0 or "271828182845" in text


@few
@given(
    st.text(alphabet="0123456789xyi+-*/^_{}()[],.=<>\\ $&%!|", max_size=40), st.sampled_from(["\\frac", "\\sqrt", ""])
)
def test_whatever_looks_like_mathematics_is_judged(text: str, command: str) -> None:
    verdict = READY["math"](Sample(prompt="", response=f"\\boxed{{{command}{text}}}", answer="\\sqrt{271828182845}"))
    assert verdict.score == 0.0


@pytest.mark.parametrize(
    "text", [r"\sqrt{i!}", r"\infty!", r"(-\infty)!", r"i!^{i!}", r"0^{-i}", r"\frac{1}{0!-1}", r"(1+i)!^{99}"]
)
def test_what_sympy_cannot_evaluate_is_wrong_and_no_failed_check(text: str) -> None:
    """Or else a model could write it to have its response left out."""
    assert READY["math"](Sample(prompt="", response=f"\\boxed{{{text}}}", answer="2")).score == 0.0


def test_what_others_do_to_decimals_changes_nothing() -> None:
    with decimal.localcontext(decimal.Context(prec=3)):
        assert READY["math"](Sample(prompt="", response=r"\boxed{1.41421356}", answer=r"\sqrt{2}")).score == 1.0


@few
@given(
    st.integers(2, 3000),
    st.integers(2, 3000),
    st.sampled_from(["{}", "x", "(1, 2)", "\\{{{}, 1\\}}", "0.5", "x = {}", "\\pi"]),
)
def test_numbers_of_thousands_of_digits_are_judged(base: int, exponent: int, other: str) -> None:
    """Python prints integers of up to 4,300 digits."""
    power, divided = f"{base}^{{{exponent}}}", f"\\frac{{{base}^{{{exponent + 1}}}}}{{{base}}}"
    judge = READY["math"]
    assert judge(Sample(prompt="", response=f"\\boxed{{{divided}}}", answer=power)).score == 1.0
    for response, answer in ((power, other.format(7)), (other.format(7), power)):
        assert judge(Sample(prompt="", response=f"\\boxed{{{response}}}", answer=answer)).score == 0.0


@few
@given(st.integers(2, 12), st.sampled_from([2, 3, 5, 7]), st.integers(-900, 900), st.integers(0, 900))
def test_surds_of_any_size(base: int, root: int, exponent: int, other: int) -> None:
    """Beside a number that is 10^1000 times larger nothing is lost, and nothing is too small to count."""
    judge = READY["math"]
    surd = f"{base}^{{{exponent}}}\\sqrt{{{root}}}"
    rewritten = f"\\frac{{{root} \\cdot {base}^{{{exponent + 1}}}}}{{{base}\\sqrt{{{root}}}}}"
    tiny = f"{surd}+{base}^{{{-other}}}"
    for gold, right in ((surd, rewritten), (tiny, f"{rewritten}+{base}^{{{-other}}}")):
        assert judge(Sample(prompt="", response=f"\\boxed{{{right}}}", answer=gold)).score == 1.0
    for gold, wrong in (
        (surd, tiny),
        (tiny, rewritten),
        (surd, "0"),
        (surd, f"{base} \\cdot {surd}"),
        (surd, f"-{surd}"),
    ):
        assert judge(Sample(prompt="", response=f"\\boxed{{{wrong}}}", answer=gold)).score == 0.0


@few
@given(st.integers(1, 9), st.sampled_from([2, 3, 5, 7]), st.integers(2, 120))
def test_a_sum_of_conjugate_powers_is_its_integer_and_no_one_of_them(whole: int, root: int, power: int) -> None:
    """Of which one is nearly the integer, and the other nearly nothing."""
    judge = READY["math"]
    a, b = 1, 0  # (whole + sqrt(root))^power = a + b sqrt(root)
    for _ in range(power):
        a, b = whole * a + root * b, a + whole * b
    up, down = (f"({whole}{sign}\\sqrt{{{root}}})^{{{power}}}" for sign in "+-")
    for response, answer, right in (
        (f"{up}+{down}", str(2 * a), True),
        (str(2 * a), f"{up}+{down}", True),
        (f"{a}-{b}\\sqrt{{{root}}}", down, True),
        (f"{a}+{b}\\sqrt{{{root}}}", up, True),
        (up, f"{up}+{down}", False),
        ("0", down, False),
        (f"{up}+{down}", str(2 * a + 1), False),
    ):
        assert judge(Sample(prompt="", response=f"\\boxed{{{response}}}", answer=answer)).score == float(right)


@few
@given(st.integers(2, 12), st.integers(-20, 20), st.integers(1, 12))
def test_formulas_with_steps_are_judged_at_integers(divisor: int, shift: int, other: int) -> None:
    judge = READY["math"]
    gold = f"\\lfloor \\frac{{n+{shift}}}{{{divisor}}} \\rfloor".replace("+-", "-")
    up = f"\\lceil \\frac{{n+{shift - divisor + 1}}}{{{divisor}}} \\rceil".replace("+-", "-")
    for response, right in ((up, 1.0), (f"{up}+1", 0.0), (f"\\lceil \\frac{{n+{shift}}}{{{divisor}}} \\rceil-1", 0.0)):
        text = response.replace("+-", "-")
        assert judge(Sample(prompt="", response=f"\\boxed{{{text}}}", answer=gold)).score == right
    assert judge(Sample(prompt="", response=f"\\boxed{{(-1)^{{n+{other}}}}}", answer="(-1)^n")).score == 1 - other % 2
