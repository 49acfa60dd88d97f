"""Numbers as people and models write them, read exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction

MAX_CHARS = 400  # of one number; longer ones are compared as text
MAX_EXPONENT = 1000  # of 10 in a number in scientific notation
FLOAT_DIGITS = 15  # what a program's floating-point number knows

# What means the same, in ASCII or LaTeX: full-width forms, signs, and one-character fractions and powers.
ASCII = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {
    ord(character): text
    for character, text in {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\ufe63", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
        **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", (f"^{{{digit}}}" for digit in range(10)), strict=True)),
        **dict(
            zip(
                "½⅓⅔¼¾⅕⅛",
                (f" \\frac{{{n}}}{{{d}}}" for n, d in ("12", "13", "23", "14", "34", "15", "18")),
                strict=True,
            )
        ),
        **{"×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "⁄": "/", "√": "\\sqrt", "π": "\\pi "},
        **{"∞": "\\infty ", "°": "^\\circ ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm "},
        **{"∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "，": ",", "；": ";", "：": ":"},
    }.items()
}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
DECIMAL = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+(?![\d/]))(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
POWER = (
    r"(?:[eE](?P<e>[+-]?\d+)"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<p>[+-]?\d+)\s*\}|(?P<q>[+-]?\d+)))"
)
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:[$€£¥]\s*)?(?:"
    rf"(?P<whole>\d+)?\s*\\frac\s*\{{\s*(?P<n>-?{DECIMAL})\s*\}}\s*\{{\s*(?P<d>-?{DECIMAL})\s*\}}"
    rf"|(?P<start>\d*)\.(?P<still>\d*)\\overline\s*\{{\s*(?P<period>\d+)\s*\}}"
    rf"|(?:(?P<mixed>\d+)\s+)?(?P<top>{DECIMAL})\s*/\s*(?P<bottom>-?{DECIMAL})"
    rf"|(?P<decimal>{DECIMAL}){POWER}?"
    rf")\s*(?:[€£]\s*)?(?P<percent>%|percent\b|percentage\b)?"
)
UNIT = re.compile(
    r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*[CF]?|\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{(?P<text>[^{}]*)\}"
    r"|\s(?P<word>[a-z]{3,}(?:\s[a-z]{2,})*))\s*(?:\^\s*(?:\d|\{\s*\d\s*\}))?\s*$"
)
NO_UNIT = re.compile(r"\b(?:or|and|to|if|not|mod|sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infinity|factorial)\b")


@dataclass(frozen=True, slots=True)
class Number:
    """A rational number as it was written."""

    value: Fraction  # 50 of "50%"
    digits: int = 0  # significant digits of a decimal fraction; 0: an integer or a quotient, which is exact
    percent: bool = False

    @property
    def plain(self) -> Fraction:
        return self.value / 100 if self.percent else self.value

    def __str__(self) -> str:
        """The same text for the same number."""
        return str(self.plain)


def ascii_of(text: str) -> str:
    """Full-width digits, signs of mathematics and other relatives as ASCII or LaTeX."""
    return text if text.isascii() else text.translate(ASCII)


def tidy(text: str) -> str:
    """Without what LaTeX needs only for looks: spaces, sizes, delimiters of mathematics and the full stop at the end."""
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)+\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|limits)(?![a-zA-Z])", "", text)
    text = re.sub(r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![a-zA-Z])", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\degree(?![a-zA-Z])", r"^\\circ", text).replace("\\%", "%").replace("\\$", "$")
    while True:
        text, before = text.strip(), text
        text = text[:-1] if text[-1:] in tuple(".,;") else text
        for left, right in (
            ("$$", "$$"),
            ("$", "$"),
            ("\\(", "\\)"),
            ("\\[", "\\]"),
            ("**", "**"),
            ("`", "`"),
            ("{", "}"),
        ):
            inside = text[len(left) : -len(right)]
            if (
                text.startswith(left)
                and text.endswith(right)
                and len(text) > len(left + right)
                and left not in inside
                and right not in inside
            ):
                text = inside
        if text == before:
            return text


def read(text: str, units: bool = True) -> Number | None:
    """The number that a tidy text is, a unit or currency aside; None: it is something else."""
    if len(text) > MAX_CHARS:
        return None
    scale = 0
    unit = UNIT.search(text) if units else None
    if unit is not None:
        words = (unit["text"] or unit["word"] or "").lower()
        first = words.split()[0] if words.split() else ""
        if not NO_UNIT.search(words):
            text = text[: unit.start()] + ("%" if first in ("percent", "percentage") else "")
            scale = SCALES.get(first, 0)
    match = NUMBER.fullmatch(text.strip().rstrip("$ "))
    return None if match is None else _number(match, scale)


def _number(match: re.Match[str], scale: int) -> Number | None:
    found = match.groupdict()
    sign, percent = -1 if found["sign"] == "-" else 1, found["percent"] is not None
    if found["decimal"] is not None:
        exponent = scale + int(found["e"] or found["p"] or found["q"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = _fraction(found["decimal"]) * Fraction(10) ** exponent
        is_rounded = "." in found["decimal"] and value.denominator > 1  # 1560.0 stands for no other integer
        return Number(sign * value, significant(found["decimal"]) if is_rounded else 0, percent)
    if found["period"] is not None:
        start, still, period = found["start"], found["still"], found["period"]
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(still))
        return Number(sign * (Fraction(f"{start or 0}.{still or 0}") + repeated), 0, percent)
    top, bottom = found["n"] or found["top"], found["d"] or found["bottom"]
    if not _fraction(bottom):
        return None
    value = _fraction(top) / _fraction(bottom) + int(found["whole"] or found["mixed"] or 0)
    return Number(sign * value * 10**scale, 0, percent)


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
    digits, is rounded or cut off to. A percentage is also its number without the sign.
    """
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
