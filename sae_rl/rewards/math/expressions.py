"""Mathematical expressions: read from LaTeX by math-verify's parser, compared by value.

Numbers and formulas are compared here: math-verify rounds to six places after the point, so that 1e-7 equals 2e-7, and takes
an exception inside its comparison for "not equal". What is of two kinds, and unions of sets, are left to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, _Latex2Sympy, normalize_latex
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.sets import FiniteSet
from math_verify import verify
from sympy.printing.str import StrPrinter

from sae_rl.rewards.math.numbers import read, tidy, written
from sae_rl.rewards.math.sizes import TooLarge, check_size, num_terms
from sae_rl.rewards.math.values import same_formula, same_relation, symbols_of

MAX_CHARS = 2000  # of an expression
MAX_DEPTH = 40  # of brackets in brackets: the parser's time grows steeply with it
MAX_OPERATIONS, MAX_TERMS = 100, 200  # of an expression, and of what it is multiplied out to for its canonical text
ROW = re.compile(r"\d[\d.]*(?:\s+[\d.]+)+")  # of numbers, which the parser would add up
LATEX = NormalizationConfig(
    basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
)
REPLACED = (
    (re.compile(r"\\\(|\\\)|\\\[|\\\]|\$|\*\*(?=\s*$)"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"\\(?:lor|vee|land|wedge)(?![A-Za-z])"), ","),
    (re.compile(r"\\(?:mathrm|text|textrm|rm|operatorname)\s*\{([eid])\}"), r"{\1}"),
    (re.compile(r"(?<=\{)\s+|\s+(?=\})"), ""),  # or else math-verify takes { e } for a unit
    (re.compile(r"(?<![\\A-Za-z])(pi|infty|infinity)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\infinity"), r"\\infty"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), ""),
    (re.compile(r"(\d(?:[\d.]*\d)?)\s*\\?%"), r"\\frac{\1}{100}"),
    (re.compile(r"(\d)\s*[eE]\s*([+-]?\d+)(?!\d*[A-Za-z])"), r"\1 \\times 10^{\2}"),
)


class Parser(_Latex2Sympy):  # type: ignore[misc]
    """Latex2sympy, but no number is written out while it reads."""

    def convert_binom(self, binom: Any) -> Any:
        return sympy.binomial(self.convert_expr(binom.upper), self.convert_expr(binom.lower), evaluate=False)

    def handle_gcd_lcm(self, name: str, numbers: list[Any]) -> Any:
        for number in numbers:
            check_size(number)
        return super().handle_gcd_lcm(name, numbers)


def parsed(text: str) -> Any:
    """The tidy text as an object of sympy, not evaluated; None: it is no mathematics.

    Raises:
        MemoryError: there is too little for it.
        TooLarge: it holds a number of too many digits.
    """
    if len(text) > MAX_CHARS or depth(text) > MAX_DEPTH:
        return None
    if ROW.fullmatch(text):
        text = ",".join(text.split())
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    found = latex(both_signs(text))
    if found is None and text.count("=") > 1 and "," not in text:
        found = latex(text.rpartition("=")[2])
    if found is None or found.has(sympy.zoo, sympy.nan):
        return None
    try:
        check_size(found)
    except (MemoryError, TooLarge):
        raise
    except Exception:  # what sympy cannot evaluate, not even roughly, it says in many ways; the text is the model's
        return None
    return found


def depth(text: str) -> int:
    """Of the brackets."""
    deep = deepest = 0
    for character in text:
        deep += (character in "([{") - (character in ")]}")
        deepest = max(deepest, deep)
    return deepest


def latex(text: str) -> Any:
    try:
        found = Parser(is_real=True).parse(normalize_latex(text, config=LATEX))
        return with_imaginary_unit(found) if isinstance(found, sympy.Basic | sympy.MatrixBase) else None
    except (MemoryError, TooLarge):
        raise
    except Exception:  # the parser raises whatever it happens to trip over; the text is the model's
        return None


def both_signs(text: str) -> str:
    """Each part with a plus-minus as two parts."""
    if "\\pm" not in text and "\\mp" not in text:
        return text
    parts = re.split(r",(?![^(\[{]*[)\]}])", text)
    return ", ".join(part.replace("\\pm", sign) for part in parts for sign in ("+", "-")[: 2 if "\\pm" in part else 1])


def with_imaginary_unit(found: Any) -> Any:
    """With i as the imaginary unit, where it is a symbol of its own."""
    i = [symbol for symbol in symbols_of(found) if symbol.name == "i"]
    return found.xreplace(dict.fromkeys(i, sympy.I)) if i else found


def equal(gold: Any, found: Any, precision: int) -> bool:
    """Whether two parsed expressions are the same mathematics.

    Raises:
        Exception: whatever stops the comparison; that is a failed check.
    """
    gold, found = without_middle(gold), without_middle(found)
    if type(gold) is type(found) and gold == found:
        return True
    if is_formula(gold) and is_formula(found):
        if isinstance(gold, sympy.Symbol) or isinstance(found, sympy.Symbol):
            return by_math_verify(gold, found, precision)
        return same_formula(gold, found, precision)
    if isinstance(gold, sympy.MatrixBase) and isinstance(found, sympy.MatrixBase):
        return gold.shape == found.shape and all_equal(gold.flat(), found.flat(), precision)
    if isinstance(gold, sympy.Tuple) and isinstance(found, sympy.Tuple):
        return len(gold) == len(found) and all_equal(gold.args, found.args, precision)
    if isinstance(gold, sympy.Interval) and isinstance(found, sympy.Interval):
        ends = (gold.left_open, gold.right_open) == (found.left_open, found.right_open)
        return ends and all_equal((gold.start, gold.end), (found.start, found.end), precision)
    if isinstance(gold, sympy.FiniteSet) and isinstance(found, sympy.FiniteSet):
        return same_members(gold, found, precision)
    if is_comparison(gold) and is_comparison(found):
        return same_relation(gold, found, precision)
    if isinstance(gold, sympy.And) and isinstance(found, sympy.And):
        return same_members(gold.args, found.args, precision)
    return by_math_verify(gold, found, precision)


def is_formula(found: Any) -> bool:
    return isinstance(found, sympy.Expr) and not isinstance(found, sympy.MatrixExpr)


def all_equal(gold: Iterable[Any], found: Iterable[Any], precision: int) -> bool:
    return all(equal(g, f, precision) for g, f in zip(gold, found, strict=True))


def same_members(gold: Collection[Any], found: Collection[Any], precision: int) -> bool:
    """Each member of one has a partner in the other, in whatever order."""
    if len(gold) != len(found):
        return False
    left = list(found)
    for wanted in gold:
        partner = next((each for each in left if equal(wanted, each, precision)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def by_math_verify(gold: Any, found: Any, precision: int) -> bool:
    return bool(verify(gold, found, float_rounding=precision, timeout_seconds=None, raise_on_error=True))


def without_middle(found: Any) -> Any:
    """z = 2 of z = 1 + 1 = 2."""
    if not isinstance(found, And) or not all(isinstance(part, sympy.Eq) for part in found.args):
        return found
    parts = found._unsorted_args
    return sympy.Eq(parts[0].lhs, parts[-1].rhs, evaluate=False)


def is_comparison(found: Any) -> bool:
    """An equation or an inequality between formulas."""
    return isinstance(found, sympy.core.relational.Relational) and is_formula(found.lhs) and is_formula(found.rhs)


class Printer(StrPrinter):  # type: ignore[misc]
    """Prints integers of any size."""

    def _print_Integer(self, found: sympy.Integer) -> str:
        return written(int(found.p))

    def _print_Rational(self, found: sympy.Rational) -> str:
        return f"{written(int(found.p))}/{written(int(found.q))}"


def canonical(found: Any) -> str:
    """The same text for the same expression, as far as multiplying out tells."""
    if isinstance(found, sympy.Eq) and isinstance(found.lhs, sympy.Symbol):
        return canonical(found.rhs)
    if isinstance(found, sympy.MatrixBase):
        return str(Printer().doprint(sympy.ImmutableMatrix(found).applyfunc(multiplied_out)))
    if isinstance(found, sympy.Float):
        number = read(tidy(str(found)))
        return str(found) if number is None else str(number)
    if isinstance(found, FiniteSet | sympy.FiniteSet):
        return "{" + ", ".join(sorted(canonical(member) for member in found.args)) + "}"
    return str(Printer().doprint(multiplied_out(found) if is_formula(found) else found))


def multiplied_out(found: Any) -> Any:
    """As far as that does not take long."""
    if found.count_ops() > MAX_OPERATIONS:
        return found
    found = found.doit()
    return sympy.expand(found) if num_terms(found) <= MAX_TERMS else found
