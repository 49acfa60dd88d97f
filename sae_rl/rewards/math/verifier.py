"""Mathematical answers: numbers are compared here, anything else as sympy's expressions that math-verify's parser reads."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from sae_rl.rewards.math.final import BOX, final_answer
from sae_rl.rewards.math.numbers import Number, ascii_of, read, same, tidy
from sae_rl.rewards.verdict import Sample, Verdict

if TYPE_CHECKING:
    from types import ModuleType

MAX_CHARS = 10_000  # of an answer that is read; a longer one is compared as text
MAX_SHOWN = 80  # characters of an answer in a verdict's reasons
# Answers whose meaning a process keeps: a group's responses have one right answer, and many of them say the same.
NUM_REMEMBERED, MAX_REMEMBERED_CHARS = 4096, 500
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
WORDS = re.compile(r"[A-Za-z][A-Za-z0-9 .,'’&/-]*")
NEEDLESS_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")  # not that of 1 1/2
IN_BRACKETS = re.compile(r"\([^()]+\)")
NAMED = re.compile(r"((?:\\(?:text|mathrm)\s*\{[^{}]*\}|\\?[A-Za-z]+|[A-Za-z]_\{?\w+\}?)(?:\s*\(\w+\))?)\s*=\s*([^=]+)")
CLOCK = re.compile(r"\d{1,2}:\d\d(?::\d\d)?(?:\s*[ap]\.?m\.?)?", re.IGNORECASE)
NUMERAL = re.compile(r"(\d[0-9A-Za-z]*)\s*_\s*(?:\{\s*(?:\\text\{)?(\d{1,2}|two|eight|sixteen)\}?\s*\}|(\d{1,2}))")
BASES = {"two": 2, "eight": 8, "sixteen": 16}


@cache
def expressions() -> ModuleType:
    """Imported when the first answer is not a plain number: sympy takes a second."""
    import logging

    from sae_rl.rewards.math import expressions as module

    # math-verify's deadline is an alarm, which works in a main thread only. Here it is off: the reward pool has the
    # deadline; and so is the warning about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return module


@dataclass(slots=True)
class Meaning:
    """One answer, read as far as needed."""

    text: str  # tidy
    words: str = ""  # in small letters, if it may be a word or a phrase
    is_text: bool = False  # it says itself that it is words
    name: str = ""  # x of "x = 5"
    number: Number | None = None
    base: int = 0  # of a numeral with its base
    problem: str = ""  # why its expression cannot be read
    _expression: list[Any] = field(default_factory=list)

    @property
    def expression(self) -> Any:
        """Of sympy; None if it is none."""
        if not self._expression:
            self._expression.append(self._parsed())
        return self._expression[0]

    def _parsed(self) -> Any:
        import sympy

        from sae_rl.rewards.math.sizes import TooLarge

        if self.number is not None:
            plain = sympy.Rational(self.number.plain.numerator, self.number.plain.denominator)
            return sympy.Float(plain, max(15, self.number.digits)) if self.number.digits else plain
        if self.is_text or len(self.text) > MAX_CHARS:
            return None
        try:
            return expressions().parsed(self.text)
        except TooLarge as error:
            self.problem = str(error)
            return None

    @property
    def says_something(self) -> bool:
        known = (
            self.number is not None or self.words or self.base or self.text.isdecimal() or len(self.text) > MAX_CHARS
        )
        return bool(self.text) and bool(known or self.expression is not None)

    @property
    def canonical(self) -> str:
        if self.number is not None:
            return str(self.number)
        if self.words and (self.is_text or len(self.words) > 1):
            return self.words
        return self.text if self.expression is None else str(expressions().canonical(self.expression))


def meaning(answer: str) -> Meaning:
    """What an answer says."""
    text = answer.strip()
    if len(text) > MAX_CHARS:
        return Meaning(text)
    return _remembered(text) if len(text) <= MAX_REMEMBERED_CHARS else _meaning(text)


def _meaning(text: str) -> Meaning:
    text = tidy(ascii_of(text))
    wrapped = TEXT.fullmatch(text)
    if wrapped is not None:
        text = wrapped[1].strip().rstrip(".")
    named = NAMED.fullmatch(text)
    value = named[2] if named is not None else text
    number = read(tidy(value[1:-1] if IN_BRACKETS.fullmatch(value) else value))
    if number is not None:
        return Meaning(text, name=re.sub(r"\s", "", named[1]) if named is not None else "", number=number)
    numeral = NUMERAL.fullmatch(text)
    if numeral is not None:
        base = BASES[numeral[2]] if numeral[2] in BASES else int(numeral[2] or numeral[3])
        return Meaning(f"{numeral[1]}_{{{base}}}", base=base)
    letters = TEXT.sub(r" \1 ", text)
    letters = letters[1:-1] if IN_BRACKETS.fullmatch(letters) else letters
    letters = " ".join(letters.split())
    words = letters.casefold() if WORDS.fullmatch(letters) or CLOCK.fullmatch(letters) else ""
    return Meaning(text, words=words, is_text=bool(words) and wrapped is not None)


_remembered = lru_cache(maxsize=NUM_REMEMBERED)(_meaning)


@lru_cache(maxsize=NUM_REMEMBERED)
def golds(answer: str) -> tuple[Meaning, ...]:
    """The right answers: one, or those of a JSON list of texts.

    Raises:
        ValueError: one of them is neither mathematics nor words, or too large to be compared.
    """
    return tuple(map(_gold, _alternatives(answer)))


def _gold(answer: str) -> Meaning:
    """Of the answer as it is, or of the final answer of a solution."""
    found = meaning(answer)
    if BOX.search(answer) or "####" in answer or ("$" in answer and not found.says_something):
        final = final_answer(answer)
        found = meaning(final.text) if not final.problem else Meaning("")
    if not found.says_something:
        problem = (
            f"cannot be compared: {found.problem}"
            if found.problem
            else "is not a number, an expression, a set or words"
        )
        raise ValueError(f"math: the answer {shown(answer)!r} {problem}")
    return found


def _alternatives(answer: str) -> list[str]:
    if answer.lstrip().startswith('["'):
        try:
            listed = json.loads(answer)
        except json.JSONDecodeError:
            return [answer]
        if all(isinstance(each, str) for each in listed):
            return list(listed)
    return [answer]


def right(gold: Meaning, found: Meaning, precision: int) -> bool:
    """Whether an answer says the same as the right one."""
    if gold.text == found.text:
        return True
    if gold.number is not None and found.number is not None:
        return (not gold.name or not found.name or gold.name == found.name) and same(
            gold.number, found.number, precision
        )
    if NEEDLESS_SPACE.sub("", gold.text) == NEEDLESS_SPACE.sub("", found.text):
        return True
    if gold.words and found.words and (gold.is_text or found.is_text or min(len(gold.words), len(found.words)) > 1):
        if gold.words == found.words:
            return True
        if gold.is_text or found.is_text:
            return _letters(gold.words) == _letters(found.words)
    if gold.is_text:
        return False
    if gold.base or found.base:
        return _same_numeral(gold, found)
    if gold.expression is None or found.expression is None or {_bracket(gold.text), _bracket(found.text)} == {"{", "("}:
        return False
    return bool(expressions().equal(gold.expression, found.expression, precision))


def _letters(words: str) -> str:
    return re.sub(r"[^a-z0-9]", "", words)


def _same_numeral(gold: Meaning, found: Meaning) -> bool:
    """With both bases by value; a base that one of them leaves out is the other's."""
    digits = [each.text.partition("_")[0] for each in (gold, found)]
    if gold.base and found.base:
        try:
            return int(digits[0], gold.base) == int(digits[1], found.base)
        except ValueError:
            return False
    return digits[0].lower() == digits[1].lower()


def _bracket(text: str) -> str:
    """A set in braces is neither a tuple nor an interval; without brackets it may be any."""
    return "{" if text.startswith("\\{") else text[:1].replace("[", "(")


def shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 10]}...{text[-7:]}"


@dataclass(frozen=True, slots=True)
class Math:
    r"""1 if the final answer equals the right one mathematically, or one of those in a JSON list of texts.

    `final_answer` says what the final answer is. A decimal of at least ``precision`` significant digits equals what it is
    rounded or cut off from; fewer digits must be exact. Units are not compared, and x % is x or x/100.
    """

    precision: int = 6
    boxed_only: bool = False  # no answer without a box

    def __post_init__(self) -> None:
        if self.precision < 1:
            raise ValueError(f"Math.precision = {self.precision}, but it must be at least 1, in significant digits")

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError if the right answer is broken, so that no response could be right."""
        wanted = golds(sample.answer)
        final = final_answer(sample.response, self.boxed_only)
        if final.problem:
            return Verdict(0.0, final.problem)
        found = meaning(final.text)
        same_as = next((gold for gold in wanted if right(gold, found, self.precision)), None)
        why = f"found {shown(final.text)}"
        if same_as is not None:
            return Verdict(1.0, f"{why}, which equals {shown(same_as.text)}", same_as.canonical)
        if found.problem:
            return Verdict(0.0, f"{why}, but {found.problem}", shown(final.text))
        if not found.says_something:
            return Verdict(0.0, f"{why}, which is no mathematics", shown(final.text))
        none = "none of" if len(wanted) > 1 else "not"
        return Verdict(0.0, f"{why}, which is {none} {', '.join(shown(gold.text) for gold in wanted)}", found.canonical)
