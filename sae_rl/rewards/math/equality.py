"""Whether two answers are the same mathematics."""

from __future__ import annotations

import re
from typing import Any

from sae_rl.rewards.extraction.numbers import same
from sae_rl.rewards.math.answers import NUMERAL, Answer, compact, expressions

# Left to do in an answer, these may be what was asked.
UNDONE = re.compile(
    r"(?:\b|\\)(gcd|lcm|max|min|det|lim)(?![a-z])|\\(sum|prod|int|mod|bmod|pmod|begin\{vmatrix)(?![A-Za-z])"
)
INTERVALS = ("()", "(]", "[)", "[]")
FUNCTION_OF_X = re.compile(r"y|[a-z]\(x\)")


def right(gold: Answer, found: Answer, precision: int) -> bool:
    """Whether an answer says the same as the right one, and has done what that has done: sums, limits and the like."""
    value = found.value or found
    undone = set(UNDONE.findall(value.text)) - set(UNDONE.findall((gold.value or gold).text))
    return not undone and equal(gold, found, precision)


def equal(gold: Answer, found: Answer, precision: int) -> bool:
    """Whether two answers say the same; an exception is a failed check."""
    is_text = gold.is_text or found.is_text
    if gold.text == found.text or (compact(gold.text) == compact(found.text) and not is_text):
        return not found.problem
    if gold.is_text and (numeral := NUMERAL.fullmatch(gold.text)):
        return numeral[1] == found.text  # a base that is left out is that of the right answer
    if gold.number is not None and found.number is not None:
        return same(gold.number, found.number, precision)
    if gold.words and found.words and _same_words(gold.words, found.words, is_text):
        return True
    if is_text and not (gold.brackets and found.brackets):
        return False
    if gold.value is not None or found.value is not None:
        return _same_equation(gold, found, precision)
    if gold.brackets or found.brackets:
        intervals = gold.brackets in INTERVALS and found.brackets in INTERVALS  # or tuples
        if _same_parts(gold, found, precision) or (
            not intervals and expressions().same_set(_pieces(gold), _pieces(found))
        ):
            return True
        if "x" not in gold.brackets + found.brackets or (gold.brackets and found.brackets):
            return False
    if gold.unit and found.unit and gold.unit != found.unit:
        return False
    return bool(expressions().equal(gold.expression, found.expression, precision))


def _same_words(gold: str, found: str, is_text: bool) -> bool:
    """Capitals and small letters are the same, but for short words that may be variables."""
    variables = re.search(r"[-/&]", gold) or (not is_text and re.search(r"\b(?!no\b)\w\w?\b", gold, re.IGNORECASE))
    return gold == found if variables else gold.casefold() == found.casefold()


def _same_equation(gold: Answer, found: Answer, precision: int) -> bool:
    """The values of two equations with one name, or of an equation and something else; or two equations as a whole."""
    value = found.value
    constants = [other for other in found.others if expressions().is_constant(other.expression)]
    if value is not None and not all(equal(value, other, precision) for other in constants):
        return False  # x = 4 = 5
    names = {answer.name for answer in (gold, found) if answer.name}
    one_name = len(names) < 2 or all(FUNCTION_OF_X.fullmatch(name) for name in names)
    if one_name and not any(
        each.value is None and getattr(each.expression, "rel_op", "") == "==" for each in (gold, found)
    ):
        return equal(gold.value or gold, value or found, precision)
    return bool(expressions().equal(gold.expression, found.expression, precision))


def _same_parts(gold: Answer, found: Answer, precision: int) -> bool:
    """Members of two lists or sets in any order, those of tuples, intervals and matrices in the same one."""
    kinds = {gold.brackets, found.brackets}
    wanted, got = _members(gold, precision), _members(found, precision)
    if "" in kinds:
        return kinds == {"", "{}"} and len(wanted) == len(got) == 1 and equal(wanted[0], got[0], precision)
    if len(wanted) != len(got):
        return False
    names = [part.name for part in wanted]
    in_order = all(names) and len(set(names)) == len(names) > 1 and not any(part.name for part in got)
    if kinds <= {",", "{}"} and not in_order:
        for part in wanted:
            partner = next((i for i, other in enumerate(got) if equal(part, other, precision)), None)
            if partner is None:
                return False
            del got[partner]
        return True
    alike = len(kinds) == 1 or kinds == {",", "()"} or (kinds == {",", "[]"} and (in_order or len(got) > 2))
    return bool(alike) and all(equal(*pair, precision) for pair in zip(wanted, got, strict=True))


def _members(answer: Answer, precision: int) -> list[Answer]:
    """The parts of an answer, or itself; members of a set, and tuples, once each."""
    members: list[Answer] = []
    for part in answer.parts if answer.brackets else (answer,):
        once = answer.brackets == "{}" or part.brackets
        if not once or not any(equal(member, part, precision) for member in members):
            members.append(part)
    return members


def _pieces(answer: Answer) -> list[Any]:
    """The expressions of an answer that may be a set of real numbers: an interval, or inequalities that are alternatives."""
    if answer.brackets in INTERVALS:
        return [answer.expression]
    if answer.brackets and (answer.brackets != "," or any(part.brackets for part in answer.parts)):
        return [None]
    return [part.expression for part in answer.parts or (answer,)]
