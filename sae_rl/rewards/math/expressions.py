"""Mathematical expressions: read from LaTeX by math-verify's parser, and compared kind by kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, _Latex2Sympy, normalize_latex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from sae_rl.rewards.extraction.markup import MAX_CHARS, TRIGONOMETRIC
from sae_rl.rewards.extraction.numbers import Number
from sae_rl.rewards.math.formulas import MAX_DIGITS, NOT_EVALUATED, digits, same_formula, same_relation

LATEX = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
CASE_MATTERS = ConversionConfig(lowercase_symbols=False)
FUNCTION = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|gcd|lcm|pi|infty|infinity"
DEGREES = re.compile(r"\^\\circ")
REPLACED = (
    (re.compile(r"\\\(|\\\)|\\\[|\\\]|\$|\*\*(?=\s*$)"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:text|operatorname)\s*\{([eid])\}"), r"{\1}"),
    (re.compile(r"(?<=[A-Za-z}])'+"), "_{prime}"),
    (re.compile(r"\\gamma(?![A-Za-z])"), r"\\varpi "),  # \gamma(2) would be the function Gamma
    (re.compile(r"(?<=\{)\s+|\s+(?=\})"), ""),
    (re.compile(rf"(?<![\\A-Za-z])({FUNCTION})(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"(?<![\\A-Za-z])a(?=(?:sin|cos|tan)(?![A-Za-z]))"), r"\\arc"),
    (re.compile(r"\\infinity"), r"\\infty"),
    (re.compile(r"\\bmod"), r"\\mod"),
    (re.compile(r"(\d(?:[\d.]*\d)?)\s*\\?%"), r"\\frac{\1}{100}"),
    (re.compile(r"(\d)\s*[eE]\s*([+-]?\d+)(?!\d*[A-Za-z])"), r"\1 \\times 10^{\2}"),
)


class Parser(_Latex2Sympy):  # type: ignore[misc]
    """Latex2sympy, but no number is written out while it reads."""

    def convert_binom(self, binom: Any) -> Any:
        return sympy.binomial(self.convert_expr(binom.upper), self.convert_expr(binom.lower), evaluate=False)

    def handle_gcd_lcm(self, name: str, numbers: list[Any]) -> Any:
        if any(map(is_too_large, numbers)):
            raise ValueError("nobody could write these numbers out")
        return super().handle_gcd_lcm(name, numbers)


def parsed(text: str) -> tuple[Any, str]:
    """The tidy text as an object of sympy, not evaluated, and why it cannot be compared. None: it is no mathematics."""
    if len(text) > MAX_CHARS:
        return None, ""
    in_degrees = TRIGONOMETRIC.search(text) is not None
    for pattern, replacement in REPLACED if in_degrees else ((DEGREES, ""), *REPLACED):
        text = pattern.sub(replacement, text)
    try:
        found = latex(text, in_degrees)
        if not isinstance(found, sympy.Basic | sympy.MatrixBase) or found.has(sympy.zoo, sympy.nan):
            return None, ""
        return (None, f"it holds a number of more than {MAX_DIGITS:,} digits") if is_too_large(found) else (found, "")
    except MemoryError:
        raise
    except Exception:  # the parser raises whatever it happens to trip over; the text is the model's
        return None, ""


def is_too_large(found: Any) -> bool:
    """Whether evaluation would have to write out a number of more than MAX_DIGITS digits."""
    return not digits(found, {}) <= MAX_DIGITS


def latex(text: str, in_degrees: bool = False) -> Any:
    """What math-verify's parser makes of LaTeX; i is the imaginary unit, and f(x) a variable. It raises many exceptions."""
    found = Parser(is_real=True, convert_degrees=in_degrees, config=CASE_MATTERS).parse(
        normalize_latex(text, config=LATEX)
    )
    meant: dict[Any, Any] = {each: sympy.Symbol(str(each), real=True) for each in found.atoms(AppliedUndef)}
    meant |= {symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"}
    return found.xreplace(meant) if meant else found


def of_number(number: Number) -> Any:
    plain = sympy.Rational(number.plain.numerator, number.plain.denominator)
    return sympy.Float(plain, max(15, number.digits)) if number.digits else plain


def equal(gold: Any, found: Any, precision: int) -> bool:
    """Whether two parsed expressions are the same mathematics."""
    if gold is None or found is None:
        return False
    gold, found = (each.doit() if isinstance(each, sympy.MatrixExpr) else each for each in (gold, found))
    if type(gold) is type(found) and gold == found:
        return True
    if is_formula(gold) and is_formula(found):
        return same_formula(gold, found, precision)
    if isinstance(gold, sympy.MatrixBase) and isinstance(found, sympy.MatrixBase):
        entries = zip(gold.flat(), found.flat(), strict=False)
        return gold.shape == found.shape and all(same_formula(*pair, precision) for pair in entries)
    if is_comparison(gold) and is_comparison(found) and same_relation(gold, found, precision):
        return True
    if isinstance(gold, sympy.And) and isinstance(found, sympy.And) and len(gold.args) == len(found.args):
        return all(any(equal(wanted, got, precision) for got in found.args) for wanted in gold.args)
    return same_set([gold], [found])


def is_formula(found: Any) -> bool:
    return isinstance(found, sympy.Expr) and not isinstance(found, sympy.MatrixExpr)


def is_constant(found: Any) -> bool:
    return is_formula(found) and not found.free_symbols and not found.has(*NOT_EVALUATED)


def is_comparison(found: Any) -> bool:
    """An equation or an inequality between formulas."""
    return isinstance(found, Relational) and is_formula(found.lhs) and is_formula(found.rhs)


def same_set(gold: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether the unions of sets of real numbers are one. Inequalities on both sides must have the same variable."""
    unions, names = [], set()
    for pieces in (gold, found):
        sets = [told for piece in pieces if (told := real_set(piece)) is not None]
        if len(sets) < len(pieces):
            return False
        unions.append(sympy.Union(*(each for each, _ in sets)))
        names |= {name for _, name in sets if name}
    return len(names) < 2 and bool(sympy.SymmetricDifference(*unions).doit().is_empty)


def real_set(found: Any) -> tuple[Any, str] | None:
    """A set that is not empty, or the numbers that satisfy inequalities of one variable, and its name; None: neither."""
    if isinstance(found, sympy.Set):
        return None if found.is_empty else (found, "")
    parts = found.args if isinstance(found, sympy.And) else (found,)
    if not all(is_comparison(part) and not isinstance(part, sympy.Eq) for part in parts):
        return None
    variables = found.free_symbols | {sympy.Abs(variable) for variable in found.free_symbols}
    solved = all(variables & set(part.args) and any(map(is_constant, part.args)) for part in found.atoms(Relational))
    return (found.as_set(), str(*found.free_symbols)) if solved and len(found.free_symbols) == 1 else None
