"""Formulas compared by their values.

Two numbers are computed with as many digits as it takes to tell them apart; two formulas are compared at some points. The
size of a number is told before anything evaluates it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import sympy
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.functions.elementary.hyperbolic import HyperbolicFunction
from sympy.functions.elementary.trigonometric import TrigonometricFunction

from sae_rl.rewards.extraction.numbers import Number, same, significant

MAX_DIGITS = 20_000  # a number that powers, factorials and products stand for may have so many
# Digits of numbers that are compared, beyond those that their sizes ask for, and how many of these must agree.
WORKING_DIGITS, AGREEING_DIGITS = 100, 80
# Where formulas are compared: irrational, of both signs, small and large. One set for all, so that a verdict is reproducible.
POINTS = (3.1830988618, -2.7182845905, 0.5772156649, -0.4142135624, 11.0901699437)
SHIFT = 0.7390851332  # between the variables of one formula
# Formulas with steps are compared at integers too: all remainders by up to 24, and some that are larger. Only at integers
# if their variables are called like integers.
STEPS = (*range(1, 25), 59, 60, 97, 100, 144, 365, 1000)
INTEGERS = "jklmnpqKMN"
NOT_EVALUATED = (ExprWithLimits, sympy.Limit, sympy.Derivative)  # sums, products and integrals have limits
Point = dict[Any, Any]  # values of the variables


def digits(found: Any, at: Point) -> float:
    """An upper bound of the digits before or behind the point of any part of an expression: 2^-2024 has 609."""
    if isinstance(found, sympy.MatrixBase):
        return max((digits(entry, at) for entry in found.flat()), default=0.0)
    if not found.args:
        number = at.get(found, 10) if isinstance(found, sympy.Symbol) else found
        if isinstance(number, sympy.Rational):
            return math.log10(abs(int(number.p)) or 1) + math.log10(int(number.q))
        return abs(float(sympy.log(abs(number), 10))) if isinstance(number, sympy.Float) and number else 1.0
    sizes = [digits(arg, at) for arg in found.args]
    size = sum(sizes) + (math.log10(len(sizes)) if isinstance(found, sympy.Add) else 0.0)
    if not size <= MAX_DIGITS or not isinstance(found, sympy.Expr) or isinstance(found, NOT_EVALUATED):
        return size
    n, *k = (magnitude(arg, at) for arg in found.args)
    if isinstance(found, sympy.Pow):
        return sizes[0] * max(1.0, *k) + sizes[1]
    if isinstance(found, sympy.binomial):
        return size + min(k[0], abs(n - k[0])) * math.log10(max(n, *k, 10.0))
    if isinstance(found, sympy.factorial | sympy.gamma):
        return size + n * math.log10(max(n, 10.0))
    return size + (n if isinstance(found, sympy.exp | HyperbolicFunction | TrigonometricFunction) else 0)


def magnitude(number: Any, at: Point) -> float:
    """The absolute value, roughly; infinite if a float cannot hold it; 1 if it is not known."""
    if number.has(*NOT_EVALUATED) or not (number.is_number or number.free_symbols <= at.keys()):
        return 1.0
    try:
        return abs(complex(number.evalf(5, subs=at)))
    except (OverflowError, TypeError):
        return math.inf


def same_formula(gold: Any, found: Any, precision: int) -> bool:
    """Two formulas are one if they have the same values at POINTS; two numbers, if they are the same."""
    if isinstance(gold, ExprWithLimits) and type(gold) is type(found) and gold.limits == found.limits:
        gold, found = gold.function, found.function
    symbols = sorted(gold.free_symbols | found.free_symbols, key=str)
    for decimal, other in () if symbols else ((gold, found), (found, gold)):
        if isinstance(decimal, sympy.Float):
            value = value_of(other, {}, digits(other, {}))
            is_real = value is not None and value.is_Number
            return is_real and same(number_of(decimal), number_of(sympy.Float(value, WORKING_DIGITS)), precision)
    num_decimals = decimals(gold, precision)
    compared = False
    for wanted, got, rounding in values(gold, found, symbols):
        if not close(wanted, got, rounding, num_decimals):
            return False
        compared = True
    return compared


def decimals(gold: Any, precision: int) -> int:
    """To how many digits a formula must agree with the right one; 0: exactly, since the right one has no long decimal."""
    return precision if any(number_of(decimal).digits >= precision for decimal in gold.atoms(sympy.Float)) else 0


def number_of(decimal: Any) -> Number:
    return Number(Fraction(str(decimal)), significant(str(decimal).split("e")[0]))


def exact(formula: Any) -> Any:
    """The formula evaluated, but for sums, integrals and limits, with its decimals as quotients."""
    if formula.has(*NOT_EVALUATED):
        return formula
    return formula.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in formula.atoms(sympy.Float)}).doit()


def same_relation(gold: Any, found: Any, precision: int) -> bool:
    """Whether an equation is the other, multiplied by a number; an inequality, by a positive number, or turned round.

    Multiplied out, every equation that is always true is 0 = 0: such a one is compared as it is written.
    """
    found = found if found.rel_op == gold.rel_op else found.reversed
    if found.rel_op != gold.rel_op:
        return False
    turns = isinstance(gold, sympy.Eq | sympy.Ne)
    sides = [[exact(each.lhs), exact(each.rhs)] for each in (gold, found)]
    if sides[0] == sides[1] or (turns and sides[0] == sides[1][::-1]):
        return True
    ratio, (wanted, got) = None, (left - right for left, right in sides)
    if not (wanted.free_symbols and got.free_symbols):
        return False
    for left, right, rounding in values(wanted, got, sorted(wanted.free_symbols | got.free_symbols, key=str)):
        zeros = {close(value, sympy.Integer(0), rounding, 0) for value in (left, right)}
        if zeros == {True}:
            continue
        ratio = left / right if ratio is None and zeros == {False} else ratio
        if ratio is None or not (turns or ratio.is_positive):
            return False
        if not close(left, ratio * right, rounding, decimals(gold, precision)):
            return False
    return ratio is not None


def values(gold: Any, found: Any, symbols: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """The values of two formulas at each of the `points` in the real domain of both, and how far rounding may part them."""
    gold, found = exact(gold), exact(found)
    for at in points(gold, found, symbols):
        size = max(digits(gold, at), digits(found, at))
        wanted, got = value_of(gold, at, size), value_of(found, at, size)
        if wanted is None or got is None:
            continue
        real = not any(value.has(sympy.I) > each.has(sympy.I) for value, each in ((wanted, gold), (got, found)))
        if real or not symbols:
            yield wanted, got, sympy.Float(10) ** -(AGREEING_DIGITS + size)


def points(gold: Any, found: Any, symbols: list[Any]) -> Iterator[Point]:
    """Where two formulas are compared."""
    stepped = in_steps(gold) | in_steps(found)
    if not symbols:
        yield {}
    elif not stepped or any(symbol.name[0] not in INTEGERS for symbol in stepped):
        for point in POINTS:
            yield {symbol: sympy.Float(point + SHIFT * i, WORKING_DIGITS) for i, symbol in enumerate(symbols)}
    rng = random.Random(0)
    for _ in symbols[:2] if stepped else ():
        columns = [rng.sample(STEPS, len(STEPS)) for _ in symbols]
        for row in zip(*columns, strict=True):
            yield dict(zip(symbols, map(sympy.Integer, row), strict=True))


def in_steps(formula: Any) -> set[sympy.Symbol]:
    """Variables at whose integers it says what it does not say between them: n of (-1)^n, and in what is rounded."""
    powers = formula.atoms(sympy.Pow)
    signs = [power.exp for power in powers if power.base.is_number and not power.base.is_extended_positive]
    steps = formula.atoms(sympy.floor, sympy.ceiling, sympy.Mod)
    return set().union(*(each.free_symbols for each in (*steps, *signs)))


def value_of(formula: Any, at: Point, size: float) -> Any:
    """A finite real or complex number; None: it has none, or nobody could write it out.

    Terms are between 10^-size and 10^size, so that twice as many digits show the smallest beside the largest.
    """
    if not size <= MAX_DIGITS or formula.has(*NOT_EVALUATED):
        return None
    if all(value.is_Integer for value in at.values()):  # exactly: else 4/2 may be rounded down to 1
        formula, at = exact(formula.xreplace(at)), {}
    try:
        value = formula.evalf(WORKING_DIGITS + 2 * math.ceil(size), subs=at)
    except ZeroDivisionError:
        return None
    parts = value.as_real_imag() if value.is_number else ()
    return value if parts and all(part.is_Number and part.is_finite for part in parts) else None


def close(wanted: Any, got: Any, rounding: Any, num_decimals: int) -> bool:
    """Whether no more than rounding is between two values, or between those of a decimal of so many digits."""
    larger = max(absolute(wanted), absolute(got))
    return bool(
        absolute(wanted - got) <= max(rounding, larger * sympy.Float(10) ** -num_decimals if num_decimals else 0)
    )


def absolute(value: Any) -> Any:
    """The absolute value of a number, even of a complex product that is not multiplied out."""
    real, imaginary = value.as_real_imag()
    return sympy.sqrt(real * real + imaginary * imaginary)
