"""What an answer says: words, a number, an equation with a value, a list, a tuple, a set, a matrix, or an expression."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import import_module
from typing import Any

from sae_rl.rewards.extraction import markup
from sae_rl.rewards.extraction.numbers import Number, read, sign_of, without_unit

MAX_CHARS = 10_000  # characters of an answer; a longer one is compared as text
MAX_DEPTH = 40  # brackets that are open at once; the parser's time grows steeply with their number
# Answers that a process keeps: a group's responses have one right answer, and many of them say the same.
NUM_REMEMBERED = 4096
WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 .,;'&/-]*")
PUNCTUATION = re.compile(r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})|[\s.,;]+")  # a single letter's hyphen is a minus sign
NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:(?:real|integer|such) )*(?:solutions?|roots?)(?: exists?)?|none|(?:the )?empty set"
)
EMPTY = re.compile(r"\\(?:emptyset|varnothing)|\\\{\s*\\\}")
NUMERAL = re.compile(r"(\d[0-9A-Z]*)_(?:\d|\{\d\d\})")  # with its base
CLOCK = re.compile(r"\d{1,2}:(?:[0-5]\d:[0-5]\d|00)")  # a time of the day, not a ratio
ROW = re.compile(r"\d[\d.]*(?:\s+[\d.]+)+")  # numbers without a comma between them
SEMICOLON = re.compile(";")
SEPARATOR = re.compile(
    rf",|\\text\s*\{{[\s,;]*{markup.ALTERNATIVE}(?:[\s,;]+{markup.ALTERNATIVE})*[\s,;]*\}}"
    rf"|\b{markup.ALTERNATIVE}\b|\\(?:lor|vee|land|wedge)(?![A-Za-z])"
)
ENVIRONMENT = re.compile(
    r"(?:([^=]+)=)?\s*[(\[]?\s*\\begin\s*\{([pb]?matrix|cases|array)\}(?:\{[lcr| ]*\})?(.*)\\end\s*\{\2\}\s*[)\]]?",
    re.DOTALL,
)
CONDITION = re.compile(r"\b(?:if|for|when|where)\b")
APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![A-Za-z])")
MEMBER = re.compile(r"([^=<>{(\[]+?)\\in(?![A-Za-z])(.+)", re.DOTALL)
BUILDER = re.compile(
    r"([A-Za-z])\s*(?:\\in(?![A-Za-z])[^|:]*?)?\s*(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|[|:])(.+)", re.DOTALL
)
EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|leqslant|geqslant|lt|gt|in|notin|not|equiv|sim)(?![A-Za-z])")
# A name holds letters, and no number except in an index, in parentheses or in an inverse: x_1, f(3), |AB|, m+n, \angle ABC.
INDEX = re.compile(r"_(?:\{[^{}]*\}|\w)|(?<=[A-Za-z}'])\([^()]*\)|\^\s*\{?\s*(?:-1|\*|\\prime|\\circ)\s*\}?")
CALCULATION = re.compile(r"(?:gcd|lcm|max|min|binom)\s*[({]|\\(?:sqrt|ln|log|exp)(?![a-z])")
NAME = re.compile(r"(?!-|\\(?:pi|infty|emptyset)\Z)(?=.*[A-Za-z])[A-Za-z\\|'\s+\-/*:(){}\[\],]+")


@cache
def expressions() -> Any:
    """Imported when the first answer is not a plain number: sympy takes a second."""
    return import_module("sae_rl.rewards.math.expressions")


@dataclass
class Answer:
    """One answer, read as far as needed."""

    text: str  # tidy
    words: str = ""  # if the answer may be a word or a phrase
    is_text: bool = False  # the answer says itself that it is words
    number: Number | None = None
    unit: str = ""  # the sign of a known unit behind a formula
    name: str = ""  # x of "x = 5"
    value: Answer | None = None  # 5 of "x = 2 + 3 = 5"
    others: tuple[Answer, ...] = ()  # 2 + 3 of "x = 2 + 3 = 5"
    brackets: str = ""  # "," of a list, "()" or "[)" of a tuple or an interval, "{}" of a set, "2x3" of a matrix
    parts: tuple[Answer, ...] = ()
    problem: str = ""  # why its expression cannot be read
    formula: str = ""  # the text without its unit

    @cached_property
    def expression(self) -> Any:
        """An object of sympy; None if the text is no expression."""
        if self.number is not None:
            return expressions().of_number(self.number)
        if self.is_text or self.problem:
            return None
        found, self.problem = expressions().parsed(self.formula or self.text)
        return found

    @property
    def says_something(self) -> bool:
        if not self.text or self.problem:
            return False
        if self.number is not None or self.words or self.brackets or self.text.isdecimal():
            return all(part.says_something for part in self.parts)
        if self.value is not None:
            return self.value.says_something
        return len(self.text) > MAX_CHARS or self.expression is not None

    @property
    def canonical(self) -> str:
        """The same text for the same number; for other answers, what they say without spaces and capitals."""
        value = self.value or self
        return str(value.number) if value.number is not None else compact(value.words or value.text).casefold()


def compact(text: str) -> str:
    """A text without the spaces that mean nothing; that of 1 1/2 means something."""
    return re.sub(r"(?<!\d) +| +(?!\d)", "", text)


@lru_cache(maxsize=NUM_REMEMBERED)
def read_answer(said: str) -> Answer:
    """What an answer says."""
    text = said.strip()
    if len(text) > MAX_CHARS:
        return Answer(text)
    text = markup.ascii_of(text)
    if markup.deepest(text) > MAX_DEPTH:
        return Answer(text, problem="its brackets are nested too deeply")
    text = markup.tidy(text)
    wrapped = markup.TEXT.fullmatch(text)
    text = wrapped[1].strip().rstrip(".") if wrapped is not None else text
    number = read(text)
    if number is not None:
        return Answer(text, number=number)
    if NUMERAL.fullmatch(text) or CLOCK.fullmatch(text):
        return Answer(text, text, is_text=True)
    words = _words(text)
    if EMPTY.fullmatch(text) or NOTHING.fullmatch(words.casefold()):
        return Answer(text, words, brackets="{}")
    answer = _environment(text) or _list(text) or _equation(text) or _in_brackets(text)
    if answer is None:
        formula, unit = ("", "") if words or markup.TRIGONOMETRIC.search(text) else without_unit(text)
        answer = Answer(text, unit=sign_of(unit), formula=formula)
    return replace(answer, words=words, is_text=bool(words) and wrapped is not None)


def _words(text: str) -> str:
    """A text that may be words, in one form; empty: it is none."""
    letters = " ".join(markup.TEXT.sub(r" \1 ", text).split())
    letters = letters[1:-1].strip() if re.fullmatch(r"\([^()]+\)", letters) else letters
    return PUNCTUATION.sub(" ", letters).strip() if WORDS.fullmatch(letters) else ""


def _environment(text: str) -> Answer | None:
    """A matrix, a system of equations, or a function that is given by cases."""
    found = ENVIRONMENT.fullmatch(text)
    if found is None or "\\begin" in found[3]:
        return None
    rows = [[entry.strip() for entry in row.split("&")] for row in found[3].split("\\\\") if row.strip()]
    if found[2] == "cases":
        answer = Answer(text, brackets=",", parts=tuple(map(_case, rows)))
    elif rows and len({len(row) for row in rows}) == 1:
        parts = tuple(read_answer(entry) for row in rows for entry in row)
        answer = Answer(text, brackets=f"{len(rows)}x{len(rows[0])}", parts=parts)
    else:
        return None
    return answer if found[1] is None else Answer(text, name=compact(found[1]), value=answer)


def _case(row: list[str]) -> Answer:
    """An equation of a system, or a value and its condition."""
    value, *condition = row
    if not condition:
        return read_answer(value)
    text = markup.tidy(CONDITION.sub("", markup.TEXT.sub(r"\1", " ".join(condition))))
    return Answer(f"({value}, {text})", brackets="()", parts=(read_answer(value), read_answer(text)))


def _list(text: str) -> Answer | None:
    """Several answers, such as both of plus-minus."""
    parts = [p.replace("\\pm", sign) for p in split_parts(text) for sign in ("+", "-")[: 2 if "\\pm" in p else 1]]
    return Answer(text, brackets=",", parts=tuple(map(read_answer, parts))) if len(parts) > 1 else None


def split_parts(text: str) -> list[str]:
    """Numbers in a row, or the parts between semicolons, or else between commas or words like "or"."""
    parts = text.split() if ROW.fullmatch(text) else markup.split(text, SEMICOLON)
    return parts if len(parts) > 1 else markup.split(text, SEPARATOR)


def _equation(text: str) -> Answer | None:
    """An equation that gives something a name, or says what a calculation comes to."""
    exact, *rounded = markup.split(text, APPROXIMATELY) or [text]
    if exact != text:
        return read_answer(f"{exact} = {rounded[0]}" if rounded and is_name(exact) else exact)
    if (member := MEMBER.fullmatch(text)) and is_name(member[1]):
        return Answer(text, name=compact(member[1]), value=read_answer(member[2]))
    sides = markup.split(text, EQUALS)
    if len(sides) < 2 or RELATION.search(text):
        return None
    if len({compact(side) for side in sides}) == 1:
        return Answer(text, problem="both of its sides are the same")
    names = [side for side in sides if is_name(side)]
    values = [read_answer(side) for side in sides if not is_name(side)]
    if not values or not (names or not any(getattr(value.expression, "free_symbols", True) for value in values)):
        return None
    return Answer(text, name=compact(names[0]) if names else "", value=values[-1], others=tuple(values[:-1]))


def is_name(side: str) -> bool:
    """Whether a side of an equation is what the other side gives a value."""
    bare = INDEX.sub("", markup.TEXT.sub(r"\1", side)).strip()
    return not CALCULATION.search(side) and NAME.fullmatch(bare) is not None


def _in_brackets(text: str) -> Answer | None:
    """A tuple, an interval or a set; or what stands in parentheses alone."""
    opening = markup.BRACKET.match(text)
    if opening is None or opening[0] not in ("(", "[", "\\{") or markup.closing(text, opening.end()) != len(text):
        return None
    inside = text[opening.end() : -1].removesuffix("\\").strip()
    brackets = opening[0][-1] + text[-1]
    if brackets == "{}" and (condition := BUILDER.fullmatch(inside)):
        return read_answer(condition[2])
    parts = split_parts(inside)
    if len(parts) < 2 and brackets != "{}":
        return read_answer(inside) if brackets == "()" else None
    return Answer(text, brackets=brackets, parts=tuple(map(read_answer, parts)))
