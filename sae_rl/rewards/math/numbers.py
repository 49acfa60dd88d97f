"""Numbers as people and models write them, read exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Context, Decimal, localcontext
from fractions import Fraction

from sae_rl.rewards.math.units import COUNTED, LETTER, NO_UNIT, sign_of, without_unit

MAX_CHARS = 400  # of one number; longer ones are compared as text
MAX_EXPONENT = 1000  # of 10 in a number in scientific notation
FLOAT_DIGITS = 15  # what a program's floating-point number knows

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
PERCENT = ("percent", "percentage", "pct")
DECIMAL = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+(?![\d/]))(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
POWER = (
    r"(?:[eE](?P<e>[+-]?\d+)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<p>[+-]?\d+)\s*\}|(?P<q>[+-]?\d+)))"
)
NUMBER = re.compile(
    rf"(?P<before>[$€£¥]?)\s*+(?P<sign>[+-]?)\s*+(?P<currency>[$€£¥]?)\s*+(?:"
    rf"(?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<n>-?{DECIMAL})\s*\}}\s*\{{\s*(?P<d>-?{DECIMAL})\s*\}}"
    rf"|(?P<start>\d*)\.(?P<still>\d*)\\overline\s*\{{\s*(?P<period>\d+)\s*\}}"
    rf"|(?:(?P<mixed>\d+)\s+)?(?P<top>{DECIMAL})\s*/\s*(?P<bottom>-?{DECIMAL})"
    rf"|(?P<decimal>{DECIMAL}){POWER}?"
    rf")\s*+(?P<after>[$€£¥]?)\s*+(?P<percent>%|(?:percent|percentage|pct)\b)?"
)


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number as it was written."""

    value: Fraction  # 50 of "50%"
    digits: int = 0  # significant digits of a decimal fraction; 0: an integer or a quotient, which is exact
    percent: bool = False
    unit: str = ""  # its sign; empty: there is none, or none that is known

    @property
    def plain(self) -> Fraction:
        return self.value / 100 if self.percent else self.value

    def __str__(self) -> str:
        """The same text for the same number."""
        return str(self.plain)


def read(text: str) -> Number | None:
    """The number that a tidy text is, a unit or currency aside; None: it is something else."""
    if len(text) > MAX_CHARS:
        return None
    words = ""
    if (match := NUMBER.fullmatch(text.strip())) is None:
        text, words = without_unit(text)
        counted = COUNTED.search(text) if not words else None
        if counted is not None and not NO_UNIT.search(counted["words"]):
            text, words = text[: counted.start()], counted["words"]
        match = NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    first, _, rest = words.lower().partition(" ")
    number = _number(match, SCALES.get(first, 0))
    if number is None or not words:
        return number
    if first in PERCENT:
        return replace(number, percent=True)
    return replace(number, unit=sign_of(rest if first in SCALES else words) or number.unit)


def read_with_letter(text: str) -> Number | None:
    """The number of "10 m", whose letter may be a unit or a variable; None: the text is something else."""
    letter = LETTER.search(text)
    number = None if letter is None else read(text[: letter.start()])
    return None if letter is None or number is None else replace(number, unit=sign_of(letter["letter"]))


def _number(match: re.Match[str], scale: int) -> Number | None:
    found = match.groupdict()
    sign, percent = -1 if found["sign"] == "-" else 1, found["percent"] is not None
    unit = sign_of(found["before"] or found["currency"] or found["after"])
    if found["decimal"] is not None:
        exponent = scale + int(found["e"] or found["p"] or found["q"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = _fraction(found["decimal"]) * Fraction(10) ** exponent
        is_rounded = "." in found["decimal"] and value.denominator > 1  # 1560.0 stands for no other integer
        return Number(sign * value, significant(found["decimal"]) if is_rounded else 0, percent, unit)
    if found["period"] is not None:
        start, still, period = found["start"], found["still"], found["period"]
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(still))
        return Number(sign * (Fraction(f"{start or 0}.{still or 0}") + repeated), 0, percent, unit)
    top, bottom = found["n"] or found["top"], found["d"] or found["bottom"]
    if not _fraction(bottom):
        return None
    value = _fraction(top) / _fraction(bottom) + int(found["whole"] or found["mixed"] or 0)
    return Number(sign * value * 10**scale, 0, percent, unit)


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", text).rstrip("."))


def significant(decimal: str) -> int:
    """How many digits of a decimal say something: not the zeros at either end."""
    return len(re.sub("[., ]", "", decimal).strip("0"))


def written(number: int) -> str:
    """All its digits. Python's own conversion stops at 4,300 of them; decimals have no such limit."""
    return str(Decimal(number))


def same(left: Number, right: Number, precision: int) -> bool:
    """Whether both are one number: exactly, or one is a decimal of at least ``precision`` digits that the other, in as many
    digits, is rounded or cut off to. A percentage is also its number without the sign. Two known units must be one.
    """
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.percent == right.percent:
        return _same(left.value, left.digits, right.value, right.digits, precision)
    return any(
        _same(a, left.digits, b, right.digits, precision)
        for a, b in ((left.plain, right.plain), (left.value, right.value))
    )


def _same(a: Fraction, a_digits: int, b: Fraction, b_digits: int, precision: int) -> bool:
    a, a_digits = _without_noise(a, a_digits)
    b, b_digits = _without_noise(b, b_digits)
    if a == b:
        return True
    shorter, digits, other = (
        (a, a_digits, b) if a_digits and (not b_digits or a_digits < b_digits) else (b, b_digits, a)
    )
    return digits >= precision and shorter in shortened(other, digits)


def _without_noise(value: Fraction, digits: int) -> tuple[Fraction, int]:
    """0.30000000000000004 is what a program prints for 0.3."""
    if digits <= FLOAT_DIGITS:
        return value, digits
    value = shortened(value, FLOAT_DIGITS)[0]
    with localcontext(Context(prec=2 * FLOAT_DIGITS)):  # other libraries change the precision of all
        return value, significant(str(Decimal(value.numerator) / Decimal(value.denominator)))


def shortened(value: Fraction, digits: int) -> tuple[Fraction, Fraction]:
    """In that many significant digits: rounded, and cut off."""
    if not value:
        return value, value
    exponent = Decimal(value.numerator).adjusted() - Decimal(value.denominator).adjusted()
    exponent -= abs(value) < Fraction(10) ** exponent
    unit = Fraction(10) ** (exponent - digits + 1)
    sign, whole = (1 if value > 0 else -1), abs(value) / unit
    return sign * unit * int(whole + Fraction(1, 2)), sign * unit * int(whole)
