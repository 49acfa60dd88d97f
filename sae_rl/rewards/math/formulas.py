"""Formulas compared by their values.

Two numbers are computed with as many digits as it takes to tell them apart; two formulas are compared at some points.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import sympy

from sae_rl.rewards.math.number_sizes import MAX_DIGITS, SOME_DIGITS, digits
from sae_rl.rewards.math.numbers import Number, same, significant

# Digits of numbers that are compared, beyond those that their sizes ask for, and how many of these must agree.
WORKING_DIGITS, AGREEING_DIGITS = 100, 80
# Where formulas are compared: irrational, of both signs, small and large. One set for all, so that a verdict is reproducible.
POINTS = (3.1830988618, -2.7182845905, 0.5772156649, -0.4142135624, 11.0901699437)
SHIFT = 0.7390851332  # between the variables of one formula
# Formulas with steps are compared at integers too: all remainders by up to 24, and some that are larger. Only at integers
# if their variables are called like integers.
STEPS = (*range(1, 25), 59, 60, 97, 100, 144, 365, 1000)
INTEGERS = "jklmnpqKMN"
Point = dict[Any, Any]  # values of the variables


def symbols_of(found: Any) -> set[sympy.Symbol]:
    return {symbol for symbol in found.free_symbols if isinstance(symbol, sympy.Symbol)}


def same_formula(gold: Any, found: Any, precision: int) -> bool:
    """Two formulas are one if they have the same values at POINTS; two numbers, if they are the same."""
    symbols = sorted(symbols_of(gold) | symbols_of(found), key=str)
    if not symbols:
        return same_values(gold, found, precision)
    num_decimals = decimals(gold, precision)
    gold, found = exact(gold), exact(found)
    roots = [] if found.has(sympy.I) else list(under_roots(found))
    compared = 0
    for at in points(gold, found, symbols):
        size = size_of(gold, found, at)
        wanted, got = value_of(gold, at, size), value_of(found, at, size)
        if wanted is None or got is None or (wanted.has(sympy.I) and not gold.has(sympy.I)) or not real_at(at, *roots):
            continue  # not a number there, or outside the real domain of one of them
        if not close(wanted, got, size, num_decimals):
            return False
        compared += 1
    return compared > 0


def same_values(gold: Any, found: Any, precision: int) -> bool:
    for decimal, other in ((gold, found), (found, gold)):
        if isinstance(decimal, sympy.Float):
            value = value_of(exact(other), {}, digits(other, {}))
            long = None if value is None else sympy.Float(value, WORKING_DIGITS) if value.is_Number else None
            return long is not None and same(number_of(decimal), number_of(long), precision)
    num_decimals = decimals(gold, precision)
    gold, found = exact(gold), exact(found)
    if isinstance(gold, sympy.Rational) and isinstance(found, sympy.Rational):
        return bool(gold == found)
    size = size_of(gold, found, {})
    wanted, got = value_of(gold, {}, size), value_of(found, {}, size)
    return wanted is not None and got is not None and close(wanted, got, size, num_decimals)


def number_of(decimal: Any) -> Number:
    return Number(Fraction(str(decimal)), significant(str(decimal).split("e")[0]))


def exact(formula: Any) -> Any:
    """The formula evaluated, with its decimals as quotients."""
    return formula.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in formula.atoms(sympy.Float)}).doit()


def decimals(gold: Any, precision: int) -> int:
    """To how many digits a formula must agree with the right one; 0: exactly, since the right one has no long decimal."""
    return precision if any(number_of(decimal).digits >= precision for decimal in gold.atoms(sympy.Float)) else 0


def same_relation(gold: Any, found: Any, precision: int) -> bool:
    """One equation is the other, multiplied by a number; one inequality by a positive number, or it is turned round.

    Multiplied out, every equation that is always true is 0 = 0: such a one is compared as it is written.
    """
    if isinstance(found, sympy.GreaterThan | sympy.StrictGreaterThan) != isinstance(
        gold, sympy.GreaterThan | sympy.StrictGreaterThan
    ):
        found = found.reversed
    if type(gold) is not type(found):
        return False
    num_decimals = decimals(gold, precision)
    wanted, got = (exact(each.lhs) - exact(each.rhs) for each in (gold, found))
    symbols = sorted(symbols_of(wanted) | symbols_of(got), key=str)
    ratio = None
    for at in points(wanted, got, symbols) if symbols_of(wanted) and symbols_of(got) else ():
        size = size_of(wanted, got, at)
        left, right = value_of(wanted, at, size), value_of(got, at, size)
        if left is None or right is None:
            continue
        zeros = [close(value, sympy.Integer(0), size, 0) for value in (left, right)]
        if any(zeros):
            if not all(zeros):
                return False
            continue
        if ratio is None:
            ratio = left / right
            if not isinstance(gold, sympy.Eq | sympy.Ne) and not ratio.is_positive:
                return False
        if not close(left, ratio * right, size, num_decimals):
            return False
    sides = [[exact(each.lhs), exact(each.rhs)] for each in (gold, found)]
    return ratio is not None or sides[0] in (
        sides[1],
        sides[1][::-1] if isinstance(gold, sympy.Eq | sympy.Ne) else None,
    )


def points(gold: Any, found: Any, symbols: list[Any]) -> Iterator[Point]:
    """Where two formulas are compared."""
    stepped = in_steps(gold) | in_steps(found)
    if not stepped or any(symbol.name[0] not in INTEGERS for symbol in stepped):
        for point in POINTS:
            yield {symbol: sympy.Float(point + SHIFT * i, WORKING_DIGITS) for i, symbol in enumerate(symbols)}
    if stepped:
        rng = random.Random(0)
        for _ in range(1 if len(symbols) == 1 else 2):
            columns = [rng.sample(STEPS, len(STEPS)) for _ in symbols]
            for row in zip(*columns, strict=True):
                yield dict(zip(symbols, map(sympy.Integer, row), strict=True))


def in_steps(formula: Any) -> set[sympy.Symbol]:
    """Variables at whose integers it says what it does not say between them: n of (-1)^n, and in what is rounded."""
    steps = formula.atoms(sympy.floor, sympy.ceiling, sympy.Mod)
    signs = [
        power.exp for power in formula.atoms(sympy.Pow) if power.base.is_number and not power.base.is_extended_positive
    ]
    return set().union(*(symbols_of(each) for each in (*steps, *signs)))


def under_roots(formula: Any) -> Iterator[Any]:
    """What must not be negative, so that a formula has a real value: under roots, and in logarithms."""
    for part in formula.atoms(sympy.Pow, sympy.log):
        if part.args[0].free_symbols and (isinstance(part, sympy.log) or part.exp.is_integer is False):
            yield part.args[0]


def real_at(at: Point, *arguments: Any) -> bool:
    return not any(argument.evalf(SOME_DIGITS, subs=at).is_negative for argument in arguments)


def size_of(gold: Any, found: Any, at: Point) -> float:
    """The digits before or behind the point of whatever either is made of."""
    return max(digits(gold, at), digits(found, at))


def value_of(formula: Any, at: Point, size: float) -> Any:
    """A finite real or complex number; None: it has none, or nobody could write it out.

    Terms are between 10^-size and 10^size, so that twice as many digits show the smallest beside the largest.
    """
    if not size <= MAX_DIGITS:
        return None
    num_digits = WORKING_DIGITS + 2 * math.ceil(size)
    try:
        if all(value.is_Integer for value in at.values()):  # exactly: else 4/2 may be rounded down to 1
            formula, at = formula.xreplace(at), {}
        value = formula.evalf(num_digits, subs=at)
        if not value.is_number or not value.is_finite:
            value = formula.doit().evalf(num_digits, subs=at)
    except ZeroDivisionError:
        return None
    parts = value.as_real_imag() if value.is_number else ()
    return value if parts and all(part.is_Number and part.is_finite for part in parts) else None


def close(wanted: Any, got: Any, size: float, num_decimals: int) -> bool:
    """Whether no more than rounding is between two values of `value_of`, or of a decimal of so many digits."""
    larger, ten = max(absolute(wanted), absolute(got)), sympy.Float(10)
    rounding = max(ten ** -(AGREEING_DIGITS + size), larger * ten ** -(AGREEING_DIGITS + 2 * size))
    return bool(absolute(wanted - got) <= max(rounding, larger * ten**-num_decimals if num_decimals else 0))


def absolute(value: Any) -> Any:
    """Of a complex number too, also where it is a product that nobody has multiplied out."""
    if value.is_Number:
        return abs(value)
    real, imaginary = value.as_real_imag()
    return sympy.sqrt(real * real + imaginary * imaginary)
