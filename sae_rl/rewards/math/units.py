"""Units behind a number or a formula. One may be left out, but two that differ are two answers."""

from __future__ import annotations

import re

# The sign of each unit, and behind it its other spellings in the singular.
UNITS = """m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; in inch inche;
ft foot feet; yd yard; mi mile; g gram; kg kilogram; mg milligram; lb pound; oz ounce; ton tonne; s sec second; min minute;
h hr hour; day; week; month; year yr; L l liter litre; mL ml milliliter; dollar $ USD; euro € EUR; cent; £ GBP; ¥ yen;
degree deg; radian rad; N newton; J joule; W watt; 2 square sq squared; 3 cubic cubed; / per; mi/h mph; unit"""
SIGNS = {spelling: unit.split()[0] for unit in UNITS.split(";") for spelling in unit.split()}
WORD = re.compile(r"[A-Za-z]+|[$€£¥/23]")
NAMES = "|".join(
    spelling for spelling in sorted(SIGNS, key=len, reverse=True) if spelling.isalpha() and len(spelling) > 1
)
NAME = rf"(?:(?:{NAMES})(?:es|s)?|[mg](?=/))"
UNIT = re.compile(
    r"(?<!\s)\s*(?:(?P<degrees>\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*[CF]?)|(?:\\text\s*\{(?P<text>[^{}]*)\}"
    rf"|(?<![A-Za-z\\])(?P<words>{NAME}(?:\s*/\s*|\s+)?(?:{NAME}|(?<=/)\s*[a-z])?(?:\s+{NAME})?))"
    r"\s*(?P<power>\^?\s*\{?\s*[23]\s*\}?)?)\s*$"
)
LETTER = re.compile(r"\s*(?<![A-Za-z\\])(?P<letter>[msghLl])\s*$")  # a unit, or a variable
COUNTED = re.compile(r"\s(?P<words>[a-z]{3,}(?:\s[a-z]{2,})*)\s*$")  # apples
NO_UNIT = re.compile(
    r"\b(?:or|and|to|if|not|mod|sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infinity|factorial|alternatively|maybe|perhaps"
    r"|possibly|otherwise|either|alpha|beta|gamma|delta|theta|lambda|sigma|omega)\b"
)


def without_unit(text: str) -> tuple[str, str]:
    """A text and the words of the unit behind it, or empty words."""
    found = UNIT.search(text)
    if found is None or not text[: found.start()].strip() or NO_UNIT.search((found["text"] or "").lower()):
        return text, ""
    words = "degree" if found["degrees"] else f"{found['text'] or found['words'] or ''} {found['power'] or ''}"
    return text[: found.start()], words.strip()


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
