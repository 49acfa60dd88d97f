r"""The final answer of a response: its last ``\boxed{}``, or else what follows "the answer is", or its last number."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sae_rl.rewards.extraction.markup import ALTERNATIVE, ascii_of, closing, tidy
from sae_rl.rewards.extraction.numbers import DECIMAL, read

MAX_BOXES = 50  # the last ones of a response, which are looked at
MAX_TAIL = 4000  # characters at the end of a response that are searched where it has no box
MAX_FORMULA = 300  # characters of a response that is nothing but a formula
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[0-9A-Za-z]))")
# Between two boxes that are one answer: nothing, a comma, "and", "or", and the signs that end and begin mathematics.
JOINER = re.compile(
    rf"(?:[\s$,;.&~*|/]|\\[()\[\]\\,;:!]|\\q?quad|\\(?:text|mbox)\s*\{{\s*{ALTERNATIVE}\s*\}}|\b{ALTERNATIVE}\b)*+"
    r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?|\([A-Za-z]\))?\s*=\s*)?",
    re.IGNORECASE,
)
HASHES = re.compile(r"####[^\S\n]*(\S[^\n]*)")
UNDENIED = r"(?:(?!\b(?:not|cannot)\b|n't\b)[^.:=\n]){0,60}?"  # between a subject and its verb
STATED = re.compile(
    rf"\banswers?\b(?:{UNDENIED}\b(?:is|are|be)\b\s*+:?|\s*+(?::|=|(?=\\\([^\S\n]*\S|\$[^\S\n]*[^\s$])))\s*+(.+)",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"(?:\b(?:not|cannot|never)|n't)(?:\s+(?:be|equal(?:\s+to)?))?(?:[\s$:(]|\\[(\[])*\Z", re.IGNORECASE
)
NAME = r"(?:[A-Za-z](?:\([A-Za-z]\))?\s*=\s*)?"
DECIMAL_OR_GROUP = rf"\(?-?[$€£]?(?:{DECIMAL})\)?"
FORMULA = r"\$\$.+?\$\$|(?<!\\)\$(?:\\.|[^$\\])+?\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]"
PLAIN = (
    rf"(?<![\w.\\])(?<![\^_]\{{)(?<!\^)[$€£]?{NAME}{DECIMAL_OR_GROUP}(?:e[+-]?\d+)?"
    rf"(?:\s*(?:[-+*/^×÷]|\*\*|\\times|\\cdot)\s*{DECIMAL_OR_GROUP})*(?:\s*(?:\\?%|percent\b))?"
    r"(?:\s(?:hundred|thousand|million|billion|trillion)\b)?|-?\\frac\{[^{}]*\}\{[^{}]*\}"
)
IS = re.compile(r"\b(?:is|are|equals|be)\b:?\s*|=\s*")
# What 2x + 1, 5 6 7 and "5 or more" have behind their first number.
GOES_ON = re.compile(
    r"\s*[-+*/^(\\]|\s+(?:\d|(?:times|plus|minus|over|or\s+(?:more|less|fewer))\b)|[A-Za-z](?![A-Za-z])"
)
BOUND = re.compile(
    r"\b(?:at (?:least|most)|(?:less|more|greater|fewer|larger|smaller) than|between)\W*(?:\Z|\d)", re.IGNORECASE
)
ATOM = rf"(?:{FORMULA}|{PLAIN})"
ATOMS = re.compile(rf"{ATOM}(?:\s*(?:(?:[,(]\s*)?(?:\b{ALTERNATIVE}\b\s*)+|,|;)\s*{ATOM})*", re.DOTALL | re.IGNORECASE)
OPERATION = re.compile(r"[\d)}]\s*(?:[-+*/×÷]|\\(?:times|cdot|div))[\s$€£({\\-]*(?:frac\{)?\.?\d")
LETTERS = re.compile(r"[\^!]|(?<![A-Za-z\\])[A-Za-z]|\\(?!times|cdot|div|frac)[A-Za-z]")
SIGN = re.compile(r"[-+*/^=<>\\,]")
# A word of a sentence: neither a command, a name of a function, nor an environment.
WORD = re.compile(
    r"(?<![\\A-Za-z{])(?!a?(?:sin|cos|tan|cot|sec|csc)h?\b|arc|log|exp|sqrt)[A-Za-z]{3,}|\b(?:so|is|we|it|of|to|in|by)\b"
)


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """A final answer, as the response has it."""

    text: str
    boxed: bool
    problem: str = ""  # why there is none


def final_answer(response: str, boxed_only: bool = False) -> FinalAnswer:
    r"""What the response answers: its last boxes side by side, or else what it states.

    Only what follows ``</think>`` counts, and nothing where ``<think>`` is never closed, nor a box behind "not".
    """
    said = after_thinking(response)
    if said is None:
        return FinalAnswer("", False, "no answer: <think> is not closed")
    boxes = boxed(said)
    if boxes:
        parts = list(dict.fromkeys(part.strip() for part in boxes))
        return FinalAnswer(", ".join(parts), True, "" if any(parts) else "no answer: the last box is empty")
    if boxed_only or BOX.search(said):
        why = "the box is denied" if boxes_in(said) else "the box is not closed" if BOX.search(said) else "no box"
        return FinalAnswer("", False, f"no answer: {why}")
    text = stated(ascii_of(said[-MAX_TAIL:]))
    return FinalAnswer(text, False, "" if text else "no answer was found")


def after_thinking(response: str) -> str | None:
    """The response without its reasoning in tags; None: the reasoning never ends."""
    return None if "<think>" in (said := response.rpartition("</think>")[2]) else said


def boxed(text: str) -> list[str]:
    """What the last complete box holds, after what boxes side by side with it hold; [] without a box."""
    found = [box for box in boxes_in(text) if not DENIED.search(text, max(0, box[0] - 20), box[0])]
    last = len(found)
    while last > 1 and JOINER.fullmatch(text, found[last - 2][1], found[last - 1][0]):
        last -= 1
    return [inside for _, _, inside in found[last - 1 :]]


def boxes_in(text: str) -> list[tuple[int, int, str]]:
    """Start, end and inside of the complete boxes that hold no other."""
    found: list[tuple[int, int, str]] = []
    for match in list(BOX.finditer(text))[-MAX_BOXES:]:
        end = match.end() if match["bare"] else closing(text, match.end(), "{}")
        if end is None:
            continue
        if found and end <= found[-1][1]:  # inside the box before
            found.pop()
        found.append((match.start(), end, match["bare"] or text[match.end() : end - 1]))
    return found


def stated(text: str) -> str:
    """The final answer of a text without a box; empty: there is none."""
    hashes = HASHES.findall(text)
    if hashes:
        return str(hashes[-1]).strip()
    if is_formula(text.strip()):
        return "" if unfinished(text) else text.strip()
    tail = ""
    said = text.replace("**", "").replace("__", "")
    while found := STATED.findall(said):  # "Final Answer: The final answer is 5"
        tail = said = str(found[-1]).strip()
    if tail:
        sentence = re.split(r"\.(?:\s|$)", tail)[0].strip()
        if not re.match(r"not\b", sentence, re.IGNORECASE) or ATOMS.search(sentence) is None:
            return _of_sentence(sentence)
    last = ""
    for match in ATOMS.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        last = last if DENIED.search(before) or BOUND.search(before) else match[0]
    return "" if unfinished(last) else last


def is_formula(text: str) -> bool:
    """Whether a text of one line has signs of mathematics and no words."""
    return "\n" not in text and len(text) <= MAX_FORMULA and SIGN.search(text) is not None and not WORD.search(text)


def unfinished(text: str) -> bool:
    """Whether it ends with a calculation of numbers that nobody has done, as a response that is cut off may."""
    value = text.rpartition("=")[2]
    return OPERATION.search(value) is not None and not LETTERS.search(value) and read(tidy(value)) is None


def _of_sentence(sentence: str) -> str:
    """The answer in what follows "the answer is": a formula, a list at its start or behind its last "is", or all of it."""
    if is_formula(sentence) or BOUND.search(sentence):
        return sentence
    starts = [0, *(match.end() for match in IS.finditer(sentence))]
    for atoms in (ATOMS.match(sentence), ATOMS.match(sentence, starts[-1]), ATOMS.search(sentence, 1)):
        if atoms is not None and not GOES_ON.match(sentence, atoms.end()):
            return atoms[0]
    return sentence
