"""Whether two answers are the same mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sae_rl.rewards.math.answers import Answer, compact, expressions
from sae_rl.rewards.math.numbers import read_with_letter, same

# Left to do in an answer, these may be what was asked.
UNDONE = re.compile(r"(?:\b|\\)(gcd|lcm|max|min|det|lim)(?![a-z])|\\(sum|prod|int|mod|bmod|pmod|begin\{vmatrix)(?![A-Za-z])")
VECTOR = re.compile(r"1x|\d+x1\Z")  # a matrix of one row or column
FUNCTION = re.compile(r"y\Z|[a-z]\(x\)\Z")
INTERVALS = ("()", "(]", "[)", "[]")


def right(gold: Answer, found: Answer, precision: int) -> bool:
    """Whether an answer says the same as the right one, and leaves no sum, limit or the like to do that the right one has done."""
    value = found if found.value is None else found.value
    if set(UNDONE.findall(value.text)) - set(UNDONE.findall(gold.text)):
        return False
    return equal(gold, found, precision)


def equal(gold: Answer, found: Answer, precision: int) -> bool:
    """Whether two answers say the same.

    Raises:
        Exception: whatever stops the comparison of expressions; that is a failed check.
    """
    is_text = gold.is_text or found.is_text
    if gold.text == found.text or (compact(gold.text) == compact(found.text) and not is_text):
        return not found.problem
    if gold.number is not None and found.number is not None:
        return same(gold.number, found.number, precision)
    if gold.words and found.words and _same_words(gold.words, found.words, is_text):
        return True
    if is_text and not (gold.brackets and found.brackets):
        return False
    if gold.value is not None or found.value is not None:
        return _same_equation(gold, found, precision)
    if gold.base or found.base:
        return _same_numeral(gold, found)
    if gold.brackets or found.brackets:
        if _same_parts(gold, found, precision) or _same_set(gold, found, precision):
            return True
        if "x" not in gold.brackets + found.brackets or (gold.brackets and found.brackets):
            return False
    if gold.number is not None and (number := read_with_letter(found.text)) is not None:
        return same(gold.number, number, precision)
    units = {gold.unit or (gold.number.unit if gold.number else ""), found.unit or (found.number.unit if found.number else "")}
    if len(units - {""}) > 1 or gold.expression is None or found.expression is None:
        return False
    return bool(expressions().equal(gold.expression, found.expression, precision))


def _same_words(gold: str, found: str, is_text: bool) -> bool:
    """Small letters and capitals are the same, but for signs of variables."""
    signs = re.search(r"[-/&]", gold) or (not is_text and re.search(r"\b(?!no\b)\w\w?\b", gold, re.IGNORECASE))
    return gold == found if signs else gold.casefold() == found.casefold()


def _same_equation(gold: Answer, found: Answer, precision: int) -> bool:
    constants = [other for other in found.others if expressions().is_constant(other.expression)]
    if found.value is not None and not all(equal(found.value, other, precision) for other in constants):
        return False  # x = 4 = 5
    values = (gold.value or gold, found.value or found)
    named = gold.name and found.name and gold.name != found.name and not (FUNCTION.match(gold.name) and FUNCTION.match(found.name))
    relations = [answer.value is None and expressions().is_equation(answer.expression) for answer in (gold, found)]
    if not named and not any(relations):
        return equal(*values, precision)
    if all(answer.number is not None for answer in values) or any(answer.brackets for answer in values):
        return False
    both = gold.expression, found.expression
    return None not in both and bool(expressions().equal(*both, precision))


def _same_numeral(gold: Answer, found: Answer) -> bool:
    """By value where the found numeral has a base; a base that it leaves out is that of the right answer."""
    digits = [answer.text.partition("_")[0] for answer in (gold, found)]
    if not found.base:
        return digits[0].lower() == digits[1].lower()
    try:
        wanted = int(digits[0], gold.base) if gold.base else gold.number.value if gold.number else None
        return int(digits[1], found.base) == wanted
    except ValueError:
        return False


def _same_parts(gold: Answer, found: Answer, precision: int) -> bool:
    """Members of two lists or sets in any order, those of tuples, intervals and matrices in the same one."""
    kinds = {gold.brackets, found.brackets}
    if "" in kinds:
        one, other = (gold, found) if gold.brackets else (found, gold)
        return one.brackets == "{}" and len(one.parts) == 1 and equal(one.parts[0], other, precision)
    wanted, got = _members(gold, precision), _members(found, precision)
    if len(wanted) != len(got):
        return False
    names = [part.name for part in wanted]
    in_order = all(names) and len(set(names)) == len(names) > 1 and not any(part.name for part in got)
    if kinds <= {",", "{}"} and not in_order:
        return _same_members(wanted, got, precision)
    alike = len(kinds) == 1 or kinds == {",", "()"} or any(VECTOR.match(kind) for kind in kinds) and kinds & {"()", "[]"}
    return bool(alike) and all(equal(*pair, precision) for pair in zip(wanted, got, strict=True))


def _members(answer: Answer, precision: int) -> list[Answer]:
    """The parts of an answer; members of a set, and tuples, once each."""
    members: list[Answer] = []
    for part in answer.parts:
        if (answer.brackets != "{}" and not part.brackets) or not any(equal(member, part, precision) for member in members):
            members.append(part)
    return members


def _same_members(wanted: Sequence[Answer], got: Sequence[Answer], precision: int) -> bool:
    left = list(got)
    for member in wanted:
        partner = next((i for i, each in enumerate(left) if equal(member, each, precision)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _same_set(gold: Answer, found: Answer, precision: int) -> bool:
    """An interval or a list of inequalities, as a set of real numbers, with another."""
    sets = [_as_set(answer) for answer in (gold, found)]
    if gold.brackets in INTERVALS and found.brackets in INTERVALS:
        return False
    return None not in sets and bool(expressions().same_set(*sets, precision))


def _as_set(answer: Answer) -> object:
    """A set of sympy; None: the answer is none."""
    if not answer.brackets:
        return expressions().real_set(answer.expression)
    if answer.brackets in INTERVALS and len(answer.parts) == 2:
        return expressions().interval(*(part.expression for part in answer.parts), answer.brackets)
    if answer.brackets == "," and not any(part.brackets for part in answer.parts):
        return expressions().union([_as_set(part) for part in answer.parts])
    return None
