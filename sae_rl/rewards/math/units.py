"""Units behind a number or a formula. An answer without a unit is right with any; two different units are different answers."""

from __future__ import annotations

import re

# One line per unit: its sign first, then its other spellings, in the singular.
SPELLINGS = (
    *("m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "in inch inche"),
    *("ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "mg milligram", "lb pound", "oz ounce", "ton tonne"),
    *("s sec second", "min minute", "h hr hour", "day", "week", "month", "year yr", "L l liter litre", "mL ml milliliter"),
    *("dollar $ USD", "euro € EUR", "cent", "£ GBP", "¥ yen", "degree deg", "radian rad", "N newton", "J joule", "W watt"),
)
SIGNS = {spelling: line.split()[0] for line in SPELLINGS for spelling in line.split()}
POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3"}
WORD = re.compile(r"[A-Za-z]+|[$€£¥/]|\d")
POWER = r"\s*(?:\^?\s*(?P<power>[23])|\^\s*\{\s*(?P<braced>[23])\s*\})?"
KNOWN = "|".join(sorted((re.escape(spelling) for spelling in SIGNS if spelling.isalpha() and len(spelling) > 1), key=len)[::-1])
UNIT = re.compile(
    r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?P<degrees>[CF]?)"
    rf"|\\text\s*\{{(?P<text>[^{{}}]*)\}}{POWER}"
    rf"|(?<![A-Za-z\\])(?P<known>(?:(?:square|sq|cubic)\s+)?(?:(?:{KNOWN})(?:es|s)?|units?)(?:\s*(?:/|\bper\b)\s*[a-z]+)?)"
    + POWER.replace("power", "power2").replace("braced", "braced2")
    + r")\s*$"
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
    if found is None or not text[: found.start()].strip():
        return text, ""
    if found["degrees"] is not None:
        return text[: found.start()], found["degrees"] or "degree"
    words = found["text"] if found["text"] is not None else found["known"]
    if NO_UNIT.search(words.lower()):
        return text, ""
    power = next((found[name] for name in ("power", "braced", "power2", "braced2") if found[name]), "")
    return text[: found.start()], f"{words.strip()} {power}".strip()


def sign_of(words: str) -> str:
    """The sign of a unit, such as ``m2`` or ``km/h``; empty: it is none that is known."""
    sign, power = "", ""
    for word in WORD.findall(words.replace("mph", "mi/h").replace("kph", "km/h")):
        if word in POWERS and sign:
            sign += POWERS[word]
        elif word in POWERS:
            power = POWERS[word]
        elif word == "per":
            sign += "/"
        elif word in "/23":
            sign += word
        else:
            known = next((SIGNS[each] for each in (word, word.lower(), word.lower().removesuffix("s")) if each in SIGNS), "")
            if not known:
                return ""
            sign, power = sign + known + power, ""
    return sign
