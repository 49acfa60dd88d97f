"""Numbers as people and models write them, read exactly, with the units behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal
from fractions import Fraction

MAX_CHARS = 400  # characters of a number; longer ones are compared as text
MAX_EXPONENT = 1000  # the largest power of 10 in scientific notation
FLOAT_DIGITS = 15  # what a program's floating-point number knows: it prints 0.30000000000000004 for 0.3

SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
DECIMAL = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+(?![\d/]))(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
FRACTION = re.compile(rf"\\frac\s*\{{\s*(-?{DECIMAL})\s*\}}\s*\{{\s*(-?{DECIMAL})\s*\}}")
# A quotient such as 1 1/2, a periodic decimal, or a decimal, perhaps in scientific notation.
NUMBER = re.compile(
    r"[$€£]?\s*+(?P<sign>[+-]?)\s*+[$€£]?\s*+(?:"
    rf"(?:(?P<whole>\d+)\s+(?=\d))?(?P<top>-?{DECIMAL})\s*/\s*(?P<bottom>-?{DECIMAL})"
    r"|(?P<start>\d*)\.(?P<still>\d*)\\overline\s*\{\s*(?P<period>\d+)\s*\}"
    rf"|(?P<decimal>{DECIMAL})"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*)(?P<exponent>[+-]?\d+)\s*\}?)?"
    r")\s*+[$€£]?\s*+(?P<percent>%)?"
)

# The sign of each unit, and behind it its other spellings in the singular.
UNITS = """m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; in inch inche;
ft foot feet; yd yard; mi mile; g gram; kg kilogram; mg milligram; lb pound; oz ounce; s sec second; min minute; h hr hour;
day; week; month; year yr; L l liter litre; mL ml milliliter; $ dollar USD; € euro; £; cent; degree deg; radian rad;
/ per; mi/h mph; 2 square sq squared; 3 cubic cubed; unit"""
SIGNS = {spelling: unit.split()[0] for unit in UNITS.split(";") for spelling in unit.split()}
WORD = re.compile(r"[A-Za-z]+|[$/23]")
NAMES = "|".join(
    spelling for spelling in sorted(SIGNS, key=len, reverse=True) if spelling.isalpha() and len(spelling) > 1
)
NAME = rf"(?:(?:{NAMES})(?:es|s)?|[mg](?=/))"
# Degrees, or words, either in \text or those of UNITS, with a power.
UNIT = re.compile(
    r"(?<!\s)\s*(?:\^\\circ\s*[CF]?|(?:\\text\s*\{(?P<text>[^{}]*)\}"
    rf"|(?<![A-Za-z\\])(?P<words>{NAME}(?:\s*/\s*|\s+)?(?:{NAME}|(?<=/)\s*[a-z])?(?:\s+{NAME})?))"
    r"\s*(?P<power>\^?\s*\{?\s*[23]\s*\}?)?)\s*$"
)
COUNTED = re.compile(r"\s(?P<words>(?!(?:squared|cubed)\b)[a-z]{3,}(?:\s[a-z]{2,})*)\s*$")  # apples
NO_UNIT = re.compile(
    r"\b(?:or|and|to|if|is|are|but|not|than|mod|sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infinity|factorial|alternatively"
    r"|maybe|perhaps|possibly|otherwise|either|alpha|beta|gamma|delta|theta|lambda|sigma|omega|times|plus|minus|over|by|base"
    r"|choose|divided|versus|through|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?"
    r"|hundredths?|thousandths?|k|dozens?|pairs?|lakhs?|crores?|hundreds|thousands|(?!(?:m|b|tr)illion\b)[a-z]+illions?)\b"
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
    text, words = FRACTION.sub(r" \1/\2", text), ""
    if (match := NUMBER.fullmatch(text.strip())) is None:
        text, words = without_unit(text)
        counted = COUNTED.search(text) if not words else None
        if counted is not None and not NO_UNIT.search(counted["words"]):
            text, words = text[: counted.start()], counted["words"]
        match = NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    first, _, rest = words.partition(" ")
    number = _number(match, SCALES.get(first, 0))
    unit = sign_of(rest if first in SCALES else words) or "".join(set(text) & set("$€£"))
    return number and replace(number, unit=unit)


def _number(match: re.Match[str], scale: int) -> Number | None:
    digits = 0
    if match["decimal"] is not None:
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = _fraction(match["decimal"]) * Fraction(10) ** (scale + exponent)
        if "." in match["decimal"] and value.denominator > 1:  # 1560.0 stands for no other integer
            digits = significant(match["decimal"])
        if digits > FLOAT_DIGITS:
            value, digits = shortened(value, FLOAT_DIGITS)[0], FLOAT_DIGITS
    elif match["period"] is not None:
        still, period = match["still"], match["period"]
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(still))
        value = Fraction(f"{match['start'] or 0}.{still or 0}") + repeated
    else:
        bottom = _fraction(match["bottom"])
        if not bottom:
            return None
        value = (_fraction(match["top"]) / bottom + int(match["whole"] or 0)) * 10**scale
    return Number(-value if match["sign"] == "-" else value, digits, match["percent"] is not None)


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", text).rstrip("."))


def significant(decimal: str) -> int:
    """How many digits of a decimal say something: not the zeros at either end."""
    return len(re.sub("[., ]", "", decimal).strip("0"))


def same(left: Number, right: Number, precision: int) -> bool:
    """Whether both are one number: exactly, or one is a decimal of at least ``precision`` digits that the other, in as many
    digits, is rounded or cut off to. A percentage is also its number without the sign. Two known units must be one.
    """
    if left.unit and right.unit and left.unit != right.unit:
        return False
    pairs = [(left.plain, right.plain)]
    if left.percent != right.percent:
        pairs.append((left.value, right.value))
    return any(
        a == b
        or (left.digits >= precision and a in shortened(b, left.digits))
        or (right.digits >= precision and b in shortened(a, right.digits))
        for a, b in pairs
    )


def shortened(value: Fraction, digits: int) -> list[Fraction]:
    """In that many significant digits: rounded, and cut off."""
    top, bottom = Decimal(value.numerator), Decimal(value.denominator)
    contexts = (Context(prec=digits, rounding=rounding) for rounding in (ROUND_HALF_UP, ROUND_DOWN))
    return [Fraction(context.divide(top, bottom)) for context in contexts]


def without_unit(text: str) -> tuple[str, str]:
    """A text and the words of the unit behind it, or empty words."""
    found = UNIT.search(text)
    if found is None or not text[: found.start()].strip() or NO_UNIT.search((found["text"] or "").lower()):
        return text, ""
    words, power = found["text"] or found["words"] or "degree", found["power"] or ""
    is_power = sign_of(words) in ("2", "3") or (power.strip() and "^" not in power and not sign_of(words))
    if is_power or not re.search("[A-Za-z$]", words):  # 5 squared, 5 times 3, 5!
        return text, ""
    return text[: found.start()], f"{words} {power}".strip()


def sign_of(words: str) -> str:
    """The sign of a unit, such as ``m2`` or ``km/h``; empty: it is none that is known."""
    signs = []
    for word in WORD.findall(words):
        sign = next((SIGNS[each] for each in (word, word.lower(), word.lower().removesuffix("s")) if each in SIGNS), "")
        if not sign:
            return ""
        signs.append(sign)
    if signs and signs[0] in "23":  # square meters
        signs = [*signs[1:2], signs[0], *signs[2:]]
    return "".join(signs).replace("unit", "")
