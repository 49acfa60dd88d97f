"""Text with LaTeX in it: brought into one form, and split where no bracket is open."""

from __future__ import annotations

import re

MAX_CHARS = 2000  # characters of an expression; a longer text is neither split nor given braces

SIGNS = "×·⋅√π∞°±≈≤≥≠∪∩∈∅ℝ"
COMMANDS = r"\times \cdot \cdot \sqrt \pi \infty ^\circ \pm \approx \le \ge \ne \cup \cap \in \emptyset \mathbb{R}"
# Full-width forms, dashes, spaces, powers, indices, fractions and signs, which have a spelling in ASCII or LaTeX.
ASCII = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\ufe63", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060")
    | dict(zip("÷⁄，；：’′", "//,;:''", strict=True))
    | {character: f"^{{{digit}}}" for digit, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | {character: f"_{{{digit}}}" for digit, character in enumerate("₀₁₂₃₄₅₆₇₈₉")}
    | {
        character: f" \\frac{{{top}}}{{{bottom}}}"
        for character, top, bottom in zip("½⅓⅔¼¾⅕⅛", "1121311", "2334458", strict=True)
    }
    | {character: f"{command} " for character, command in zip(SIGNS, COMMANDS.split(), strict=True)}
)
PLAIN = r"(\\[A-Za-z]+|[0-9A-Za-z])"  # an argument of one letter, digit or command
# What is only for looks is removed, and what has several spellings gets one.
REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)+\s*(?=\d{3}(?!\d))", ","),  # between thousands
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|bf|it|rm)(?![A-Za-z])|\\(?:text)?color\s*\{\w*\}", ""),
        (r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm|underline)\s*(?=\{)", ""),
        (r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:text(?:bf|it|rm|normal|sf|tt)|mathrm|mbox)(?![A-Za-z])", r"\\text"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\degree(?![A-Za-z])|\^\s*(?:\\circ|\{\s*\\circ\s*\})", r"^\\circ"),
        (r"\s*(?:\\text\s*\{\s*percent(?:age)?\s*\}|\bpercent\b)", "%"),
        (r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda found: {"l": "\\{", "r": "\\}"}[found[0][1]]),
        (r"\\(?:langle|rangle)(?![A-Za-z])", lambda found: {"l": "(", "r": ")"}[found[0][1]]),
        (r"_\s*\{\s*(\w)\s*\}", r"_\1"),
        # Arguments without braces, as in \frac \pi4
        (rf"\\sqrt\s*(\[[^\[\]]*\])?\s*{PLAIN}", r"\\sqrt\1{\2}"),
        (rf"\\frac\s*{PLAIN}", r"\\frac{\1}"),
        (rf"(\\frac\s*\{{[^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}})\s*{PLAIN}", r"\1{\2}"),
        (r"^\s*0?(\d{1,2}:[0-5]\d)(?::00)?\s*$", r"\1"),  # a time of the day
        (r"(?<=\d)\s*\^\s*\{\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}|\\\s*\Z|\\(?=[%$])", ""),
    )
]
WRAPPED = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
ALTERNATIVE = r"(?:or|and|alternatively|otherwise|maybe|perhaps|possibly)"  # between two answers
TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")  # whose arguments may be in degrees
IN_PARENTHESES = re.compile(r"(?:\^|sqrt)\s*\(")
COMMA = re.compile(r",(?!\d{3}\b)")
TEXT = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
BRACKET = re.compile(r"\\.|[(){}\[\]]", re.DOTALL)
DEPTH = dict.fromkeys(["(", "[", "{", "\\{"], 1) | dict.fromkeys([")", "]", "}", "\\}"], -1)


def ascii_of(text: str) -> str:
    """Full-width digits, signs of mathematics and other relatives as ASCII or LaTeX."""
    return text if text.isascii() else text.translate(ASCII)


def tidy(text: str) -> str:
    """The text without what LaTeX needs only for looks: spaces, sizes, fonts, delimiters, the full stop at the end."""
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    text = with_braces(text) if len(text) <= MAX_CHARS else text
    while True:
        text, before = text.strip(), text
        text = text[:-1] if text[-1:] in tuple(".,;") else text
        for left, right in WRAPPED:
            inside = text[len(left) : -len(right)]
            if inside and text == left + inside + right and left not in inside and right not in inside:
                text = inside
        if text.startswith("{") and closing(text, 1, "{}") == len(text):
            text = f"\\{{{text[1:-1]}\\}}" if COMMA.search(text) else text[1:-1]  # a set, as people write it
        if text == before:
            return text


def with_braces(text: str) -> str:
    """Roots and powers with braces instead of parentheses around their arguments."""
    for found in reversed(list(IN_PARENTHESES.finditer(text))):
        end = closing(text, found.end(), "()")
        if end is not None:
            text = f"{text[: found.end() - 1]}{{{text[found.end() : end - 1]}}}{text[end:]}"
    return text


def closing(text: str, start: int, brackets: str | None = None) -> int | None:
    r"""Where the text goes on behind the bracket that closes the one before ``start``; None: it is never closed.

    Args:
        brackets: the only two that count. By default all do, ``\{`` too, and any closes any other, as in [0, 1).
    """
    depth = 1
    for match in BRACKET.finditer(text, start):
        if brackets is None or match[0] in brackets:
            depth += DEPTH.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def deepest(text: str) -> int:
    """How many brackets are open at once."""
    depth = most = 0
    for bracket in BRACKET.finditer(text):
        depth += DEPTH.get(bracket[0], 0)
        most = max(most, depth)
    return most


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between the separators that are in no bracket; empty parts are left out."""
    if len(text) > MAX_CHARS:
        return [text]
    parts, start, depth, seen = [], 0, 0, 0
    for match in separator.finditer(text):
        depth += sum(DEPTH.get(bracket[0], 0) for bracket in BRACKET.finditer(text, seen, match.start()))
        seen = match.start()
        if depth == 0:
            parts.append(text[start : match.start()])
            start = seen = match.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]
