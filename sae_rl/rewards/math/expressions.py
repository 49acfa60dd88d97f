"""Mathematical expressions: read from LaTeX by math-verify's parser, and compared kind by kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, _Latex2Sympy, normalize_latex
from sympy.core.function import AppliedUndef
from sympy.printing.str import StrPrinter

from sae_rl.rewards.math.answers import TRIGONOMETRIC
from sae_rl.rewards.math.formulas import same_formula, same_relation, symbols_of
from sae_rl.rewards.math.markup import MAX_CHARS
from sae_rl.rewards.math.number_sizes import TooLarge, check_size, num_terms
from sae_rl.rewards.math.numbers import Number, read, written

MAX_OPERATIONS, MAX_TERMS = 100, 200  # of an expression, and of what it is multiplied out to for its canonical text
LATEX = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)
CASE_MATTERS = ConversionConfig(lowercase_symbols=False)
FUNCTION = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|gcd|lcm|pi|infty|infinity"
DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
REPLACED = (
    (re.compile(r"\\\(|\\\)|\\\[|\\\]|\$|\*\*(?=\s*$)"), " "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:text|operatorname)\s*\{([eid])\}"), r"{\1}"),
    (re.compile(r"(?<=[A-Za-z}])'+"), "_{prime}"),
    (re.compile(r"\\gamma(?![A-Za-z])"), r"\\varpi "),  # \gamma(2) would be the function Gamma
    (re.compile(r"(?<=\{)\s+|\s+(?=\})"), ""),
    (re.compile(rf"(?<![\\A-Za-z])({FUNCTION})(?![A-Za-z])"), r"\\\1"),
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
        for number in numbers:
            check_size(number)
        return super().handle_gcd_lcm(name, numbers)


def parsed(text: str) -> tuple[Any, str]:
    """The tidy text as an object of sympy, not evaluated, and why it cannot be compared. None: it is no mathematics.

    Raises:
        MemoryError: there is too little for it.
    """
    if len(text) > MAX_CHARS:
        return None, ""
    in_degrees = TRIGONOMETRIC.search(text) is not None
    for pattern, replacement in REPLACED if in_degrees else ((DEGREES, ""), *REPLACED):
        text = pattern.sub(replacement, text)
    try:
        found = latex(text, in_degrees)
        if not isinstance(found, sympy.Basic | sympy.MatrixBase) or found.has(sympy.zoo, sympy.nan):
            return None, ""
        check_size(found)
    except MemoryError:
        raise
    except TooLarge as error:
        return None, str(error)
    except Exception:  # the parser raises whatever it happens to trip over; the text is the model's
        return None, ""
    return found, ""


def latex(text: str, in_degrees: bool = False) -> Any:
    """What math-verify's parser makes of LaTeX; i is the imaginary unit. It raises many exceptions."""
    found = Parser(is_real=True, convert_degrees=in_degrees, config=CASE_MATTERS).parse(normalize_latex(text, config=LATEX))
    i = [symbol for symbol in symbols_of(found) if symbol.name == "i"]
    return found.xreplace(dict.fromkeys(i, sympy.I)) if i else found


def of_number(number: Number) -> Any:
    plain = sympy.Rational(number.plain.numerator, number.plain.denominator)
    return sympy.Float(plain, max(15, number.digits)) if number.digits else plain


def equal(gold: Any, found: Any, precision: int) -> bool:
    """Whether two parsed expressions are the same mathematics.

    Raises:
        Exception: whatever stops the comparison; that is a failed check.
    """
    gold, found = (each.doit() if isinstance(each, sympy.MatrixExpr) else each for each in (gold, found))
    if type(gold) is type(found) and gold == found:
        return True
    if is_formula(gold) and is_formula(found):
        return same_formula(gold, found, precision)
    if isinstance(gold, sympy.MatrixBase) and isinstance(found, sympy.MatrixBase):
        return gold.shape == found.shape and all_equal(gold.flat(), found.flat(), precision)
    if is_comparison(gold) and is_comparison(found) and same_relation(gold, found, precision):
        return True
    if isinstance(gold, sympy.And) and isinstance(found, sympy.And) and len(gold.args) == len(found.args):
        return all(any(equal(wanted, got, precision) for got in found.args) for wanted in gold.args)
    sets = real_set(gold), real_set(found)
    return None not in sets and same_set(*sets, precision)


def all_equal(gold: Iterable[Any], found: Iterable[Any], precision: int) -> bool:
    return all(equal(*pair, precision) for pair in zip(gold, found, strict=True))


def is_formula(found: Any) -> bool:
    return isinstance(found, sympy.Expr) and not isinstance(found, sympy.MatrixExpr)


def is_constant(found: Any) -> bool:
    return is_formula(found) and not found.free_symbols


def is_comparison(found: Any) -> bool:
    """An equation or an inequality between formulas."""
    return isinstance(found, sympy.core.relational.Relational) and is_formula(found.lhs) and is_formula(found.rhs)


def is_equation(found: Any) -> bool:
    return isinstance(found, sympy.Eq) and is_comparison(found)


def real_set(found: Any) -> tuple[Any, str] | None:
    """The real numbers that a set, or inequalities of one variable, tell, and the name of that variable."""
    if isinstance(found, sympy.Set):
        return found, ""
    if not isinstance(found, sympy.logic.boolalg.Boolean):
        return None
    found = found.xreplace({each: sympy.Symbol(str(each), real=True) for each in found.atoms(AppliedUndef)})
    told: Any = sympy.S.Reals
    for part in found.args if isinstance(found, sympy.And) else (found,):
        sides = [side.args[0] if isinstance(side, sympy.Abs) else side for side in part.args]
        simple = len(found.free_symbols) == 1 and any(side in found.free_symbols for side in sides)
        if not is_comparison(part) or isinstance(part, sympy.Eq) or not simple or not any(map(is_constant, sides)):
            return None
        told = told.intersect(part.as_set())
    return told, str(*found.free_symbols)


def interval(start: Any, end: Any, brackets: str) -> tuple[Any, str] | None:
    real = all(is_constant(each) and each.is_extended_real for each in (start, end))
    return (sympy.Interval(start, end, brackets[0] == "(", brackets[1] == ")"), "") if real else None


def union(sets: list[tuple[Any, str] | None]) -> tuple[Any, str] | None:
    told = [each for each in sets if each is not None]
    names = {name for _, name in told}
    return (sympy.Union(*(each for each, _ in told)), names.pop()) if len(told) == len(sets) and len(names) == 1 else None


def same_set(gold: tuple[Any, str], found: tuple[Any, str], precision: int) -> bool:
    """Two sets whose pieces have the same ends. A variable that both name must be the same."""
    if gold[1] and found[1] and gold[1] != found[1]:
        return False
    pieces = []
    for each, _ in (gold, found):
        told = each.doit()
        told = sympy.Interval(-sympy.oo, sympy.oo) if told == sympy.S.Reals else told
        pieces.append(told.args if isinstance(told, sympy.Union) else (told,))
    return len(pieces[0]) == len(pieces[1]) and all(same_piece(*pair, precision) for pair in zip(*pieces, strict=True))


def same_piece(gold: Any, found: Any, precision: int) -> bool:
    if isinstance(gold, sympy.Interval) and isinstance(found, sympy.Interval):
        ends = (gold.left_open, gold.right_open) == (found.left_open, found.right_open)
        return ends and all_equal((gold.start, gold.end), (found.start, found.end), precision)
    if isinstance(gold, sympy.FiniteSet) and isinstance(found, sympy.FiniteSet) and len(gold) == len(found):
        return all_equal(gold, found, precision)
    return bool(gold == found)


class Printer(StrPrinter):  # type: ignore[misc]
    """Prints integers of any size."""

    def _print_Integer(self, found: sympy.Integer) -> str:
        return written(int(found.p))

    def _print_Rational(self, found: sympy.Rational) -> str:
        return f"{written(int(found.p))}/{written(int(found.q))}"


def canonical(found: Any) -> str:
    """The same text for the same expression, as far as multiplying out tells."""
    if isinstance(found, sympy.Float):
        number = read(str(found))
        return str(found) if number is None else str(number)
    if isinstance(found, sympy.MatrixBase):
        found = sympy.ImmutableMatrix(found).applyfunc(multiplied_out)
    return str(Printer().doprint(multiplied_out(found) if is_formula(found) else found))


def multiplied_out(found: Any) -> Any:
    """A formula without products of sums, as far as that does not take long."""
    if found.count_ops() > MAX_OPERATIONS:
        return found
    found = found.doit()
    return sympy.expand(found) if num_terms(found) <= MAX_TERMS else found
