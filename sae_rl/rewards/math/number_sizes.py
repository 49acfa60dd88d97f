"""How large the numbers in an expression are, told before anything evaluates it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
from sympy.functions.elementary.hyperbolic import HyperbolicFunction
from sympy.functions.elementary.trigonometric import TrigonometricFunction

MAX_DIGITS = 20_000  # a number that powers, factorials and products stand for may have so many
SOME_DIGITS = 5  # what is needed to tell how large a number is
ANY_VARIABLE = 10.0  # what a variable stands for as long as it has no value
Values = Mapping[Any, Any]  # the values of variables


class TooLarge(ValueError):
    """A power or factorial that nobody could write out."""


def check_size(found: Any) -> None:
    """Raises TooLarge if evaluation would have to write out a number of more than MAX_DIGITS digits."""
    if not digits(found, {}) <= MAX_DIGITS:
        raise TooLarge(f"it holds a number of more than {MAX_DIGITS:,} digits")


def digits(found: Any, at: Values) -> float:
    """An upper bound of the digits before or behind the point of any part of an expression, multiplied out or not.

    2^2024 and 2^-2024 have 609. Beyond MAX_DIGITS it may be anything that is larger.
    """
    if isinstance(found, sympy.MatrixBase):
        return max((digits(entry, at) for entry in found.flat()), default=0.0)
    if not found.args:
        return abs(log10(at.get(found, ANY_VARIABLE) if isinstance(found, sympy.Symbol) else found))
    if isinstance(found, sympy.Pow | sympy.exp):
        base, exponent = found.as_base_exp()
        return of_power(base, exponent, at)
    if isinstance(found, sympy.Sum | sympy.Product):
        return of_series(found, at)
    parts = [digits(arg, at) for arg in found.args]
    if isinstance(found, sympy.Add) or not isinstance(found, sympy.Expr):
        return max(parts) + math.log10(len(parts))
    return sum(parts) + (of_function(found, at) if max(parts) <= MAX_DIGITS else 0.0)


def log10(number: Any) -> float:
    """The logarithm of an absolute value; for a quotient of integers the sum of both; 0 for what is no number."""
    if isinstance(number, sympy.Rational):
        return math.log10(abs(int(number.p)) or 1) + math.log10(int(number.q))
    if isinstance(number, sympy.Float | sympy.NumberSymbol | float):
        size = abs(float(number))
        return math.log10(size) if 0.0 < size < math.inf else float(sympy.log(abs(number) or 1.0, 10))
    return 0.0


def of_power(base: Any, exponent: Any, at: Values) -> float:
    """At least those of the base: what a root hides counts too."""
    parts = digits(base, at), 0.0 if exponent.is_Integer else digits(exponent, at)
    if max(parts) > MAX_DIGITS:
        return max(parts)
    size = parts[0]
    if isinstance(base, sympy.Add) and base.is_number:  # what is left when its terms cancel
        size = max(size, abs(log10(rough(base, at))))
    turn = 0.0 if exponent.is_real else math.pi / math.log(10)  # z^i is as large as the angle of z makes it
    return parts[1] + (size + turn) * max(1.0, magnitude(exponent, at)) if size + turn else parts[1]


def of_series(found: Any, at: Values) -> float:
    """A sum or a product, at the ends of its limits."""
    count, inner = 1.0, dict(at)
    for variable, *ends in found.limits:
        if not max(digits(end, at) for end in ends) <= MAX_DIGITS:
            return math.inf
        finite = [magnitude(end, at) for end in ends if end.is_finite]
        inner[variable] = max(finite, default=ANY_VARIABLE)
        count *= 1.0 + sum(finite)
    terms = digits(found.function, inner)
    return terms * count if isinstance(found, sympy.Product) else terms + math.log10(count)


def of_function(found: Any, at: Values) -> float:
    """What a function adds to the digits of its arguments."""
    if isinstance(found, sympy.binomial):
        n, k = (magnitude(arg, at) for arg in found.args)
        return min(k, abs(n - k)) * math.log10(max(n, k, 10.0))
    if isinstance(found, sympy.factorial | sympy.gamma):
        n = magnitude(found.args[0], at)
        return n * math.log10(max(n, 10.0))
    turns = isinstance(found, TrigonometricFunction) and found.args[0].is_real
    if isinstance(found, HyperbolicFunction | TrigonometricFunction) and not turns:
        return magnitude(found.args[0], at) / math.log(10)
    return 0.0


def magnitude(number: Any, at: Values) -> float:
    """The absolute value, roughly; infinite if a float cannot hold it. Variables without a value leave 1."""
    if not number.is_number and not number.free_symbols <= at.keys():
        return 1.0
    try:
        return abs(complex(rough(number, at)))
    except OverflowError:
        return math.inf


def rough(number: Any, at: Values) -> Any:
    value = number.evalf(SOME_DIGITS, subs=dict(at))
    return value if value.is_Number else abs(value).evalf(SOME_DIGITS)
