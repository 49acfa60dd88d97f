"""Text with LaTeX in it: brought into one form, and split where no bracket is open."""

from __future__ import annotations

import re

MAX_CHARS = 2000  # of an expression; a longer text is neither split nor given braces

# Characters that have a spelling in ASCII or LaTeX: full-width forms, signs, and one-character fractions and powers.
ASCII = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {
    ord(character): text
    for character, text in {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\ufe63", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
        **{character: f"^{{{digit}}}" for digit, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{character: f"_{{{digit}}}" for digit, character in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        **{"½": " \\frac{1}{2}", "⅓": " \\frac{1}{3}", "⅔": " \\frac{2}{3}", "¼": " \\frac{1}{4}", "¾": " \\frac{3}{4}"},
        **{"⅕": " \\frac{1}{5}", "⅛": " \\frac{1}{8}", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "⁄": "/"},
        **{"√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ", "°": "^\\circ ", "±": "\\pm ", "≈": "\\approx ", "ℝ": "\\mathbb{R}"},
        **{"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset "},
        **{"，": ",", "；": ";", "：": ":", "’": "'", "′": "'"},
    }.items()
}
# Removed, or rewritten, whatever stands around it.
REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)+\s*(?=\d{3}(?!\d))", ","),  # between thousands
        (r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|displaystyle|limits|bf|it|rm|boldmath)(?![A-Za-z])", ""),
        (r"\\(?:textcolor|color)\s*\{\w*\}", ""),
        (r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm|underline|phantom)\s*(?=\{)", ""),
        (r"(?<!\\)\\[,!;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:text(?:bf|it|rm|normal|sf|tt)|mathrm|mbox)(?![A-Za-z])", r"\\text"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\degree(?![A-Za-z])", r"^\\circ"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"_\s*\{\s*(\w)\s*\}", r"_\1"),
        (r"\\\s*\Z", ""),
        (r"\\%", "%"),
        (r"\\\$", "$"),
    )
)
WRAPPED = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
COMMAND = re.compile(r"\\frac(?![A-Za-z])|\\sqrt(?![A-Za-z])(?:\s*\[[^\[\]]*\])?|(?<![\\A-Za-z])sqrt(?=\s*\()|\^(?=\s*\()")
ALTERNATIVE = r"(?:or|and|alternatively|otherwise|maybe|perhaps|possibly)"  # between two answers
ARGUMENT = re.compile(r"\s*(?:(?P<open>[{(])|(?P<plain>\\[A-Za-z]+|[0-9A-Za-z]))")
BRACKET = re.compile(r"\\.|[(){}\[\]]", re.DOTALL)
BRACKETS = {"{": "{}", "(": "()"}
OPENING, CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")


def ascii_of(text: str) -> str:
    """Full-width digits, signs of mathematics and other relatives as ASCII or LaTeX."""
    return text if text.isascii() else text.translate(ASCII)


def tidy(text: str) -> str:
    """The text without what LaTeX needs only for looks: spaces, sizes, fonts, colors, delimiters, the full stop at the end."""
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    if len(text) <= MAX_CHARS:
        text = with_braces(text)
    while True:
        text, before = text.strip(), text
        text = text[:-1] if text[-1:] in tuple(".,;") else text
        for left, right in WRAPPED:
            inside = text[len(left) : -len(right)]
            wrapped = text.startswith(left) and text.endswith(right) and len(text) > len(left + right)
            if wrapped and left not in inside and right not in inside:
                text = inside
        if text.startswith("{") and text.endswith("}") and closing(text, 1, "{}") == len(text):
            text = text[1:-1]
        if text == before:
            return text


def with_braces(text: str) -> str:
    r"""The text with braces around the arguments of fractions, roots and powers that have none, or parentheses: ``\frac \pi4``."""
    done, at = "", 0
    while found := COMMAND.search(text, at):
        command = "\\sqrt" if found[0] == "sqrt" else found[0]
        done, at = done + text[at : found.start()] + command, found.end()
        for _ in range(2 if command == "\\frac" else 1):
            argument = ARGUMENT.match(text, at)
            end = None if argument is None else closing(text, argument.end(), BRACKETS[argument["open"]]) if argument["open"] else argument.end()
            if argument is None or end is None or (argument["open"] == "(" and command == "\\frac"):
                break
            inside = argument["plain"] or text[argument.end() : end - 1]
            done, at = f"{done}{{{with_braces(inside)}}}", end
    return done + text[at:]


def closing(text: str, start: int, brackets: str = "(){}[]") -> int | None:
    """Where the text goes on behind the bracket that closes the one before ``start``; None: it is never closed.

    Any kind closes any other, as in [0, 1). In LaTeX ``\\{`` is a bracket too, but not among braces alone.
    """
    depth = 1
    for match in BRACKET.finditer(text, start):
        if match[0] in brackets or len(brackets) > 2:
            depth += (match[0] in OPENING) - (match[0] in CLOSING)
        if depth == 0:
            return match.end()
    return None


def depth(text: str) -> int:
    """How many brackets are open at once."""
    deep = deepest = 0
    for character in text:
        deep += (character in "([{") - (character in ")]}")
        deepest = max(deepest, deep)
    return deepest


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between the separators that are in no bracket; empty parts are left out."""
    if separator.search(text) is None or len(text) > MAX_CHARS:
        return [text]
    parts, start, depth, seen = [], 0, 0, 0
    for match in separator.finditer(text):
        for bracket in BRACKET.finditer(text, seen, match.start()):
            depth += (bracket[0] in OPENING) - (bracket[0] in CLOSING)
        seen = match.start()
        if depth == 0:
            parts.append(text[start : match.start()])
            start = seen = match.end()
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]
