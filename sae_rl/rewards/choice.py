"""Multiple choice: one letter."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from sae_rl.rewards.extraction.final_answer import BOX, MAX_TAIL, UNDENIED, after_thinking, boxed
from sae_rl.rewards.extraction.markup import TEXT, ascii_of
from sae_rl.rewards.verdict import Sample, Verdict

SAID = re.compile(
    rf"\b(?:answer|option|choice)\b(?:{UNDENIED}\b(?:is|be)\b\s*+:?|\s*+(?::|=))\s*+([^\n]+)", re.IGNORECASE
)
DECORATION = re.compile(r"\\(?:left|right|quad|[,;:! ()\[\]])|[$*_`~]")
WORD_BEFORE = re.compile(
    r"^(?:(?:the|option|choice|answer|letter|it is|i (?:think|believe|choose)|most|probably|likely|clearly)\s*:?\s+)+",
    re.IGNORECASE,
)
OTHER = r"(?:[,;/&]|\b(?:or|and|maybe|perhaps|possibly)\b)"  # before a second choice
GOES_ON = r"\s+(?!(?:or|and|is|was)\b)[a-z]"  # "A large cat", "I think": no letter


@dataclass(frozen=True, slots=True)
class Choice:
    r"""1 if the response chooses the right letter.

    It chooses in its last box, or else behind its last "answer is", or else at the beginning of its last line.
    ``(B)``, ``B.``, ``B) 42`` and ``\text{B}`` are B. More than one letter is no choice.
    """

    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        letters = self.letters
        if len(letters) < 2 or len(set(letters)) < len(letters) or not set(letters) <= set(string.ascii_uppercase):
            raise ValueError(f"Choice.letters = {letters!r}, but it must be two or more different letters of A-Z")

    def read_answer(self, answer: str) -> list[str]:
        """The right answer. Raises ValueError if it is not one of the letters."""
        wanted = self.letters_in(answer)
        if len(wanted) != 1:
            raise ValueError(f"choice: the answer {answer[:80]!r} is not one letter of {self.letters}")
        return wanted

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError as `read_answer`."""
        wanted = self.read_answer(sample.answer)
        text = self.chosen(sample.response)
        found = self.letters_in(text)
        if len(found) != 1:
            why = f"{' and '.join(found)}, which is more than one choice" if found else "no letter"
            return Verdict(0.0, f"found {why}")
        right = found == wanted
        return Verdict(float(right), f"found {found[0]}, which is {'right' if right else f'not {wanted[0]}'}", found[0])

    def chosen(self, response: str) -> str:
        """The part of a response that says its choice; empty: there is none."""
        said = ascii_of(after_thinking(response) or "")
        boxes = boxed(said)
        if boxes or BOX.search(said):
            return ", ".join(boxes)
        said = DECORATION.sub("", said[-MAX_TAIL:])
        stated = ""
        rest = said
        while found := SAID.findall(rest):  # "The answer is A. No: the answer is B."
            stated = rest = str(found[-1])
        if stated:
            return stated
        lines = said.strip().splitlines()
        last = lines[-1].strip() if lines else ""
        return last if re.match(rf"\(?[{self.letters}](?:[).:]|$)", last) else ""

    def letters_in(self, text: str) -> list[str]:
        """The letters that a text chooses, each once."""
        text = DECORATION.sub(" ", TEXT.sub(r" \1 ", ascii_of(text))).strip()
        text = WORD_BEFORE.sub("", text)
        alone = re.fullmatch(rf"[(\[{{]*\s*([{self.letters}{self.letters.lower()}])\s*[)\]}}]*[.:]?", text)
        if alone is not None:
            return [alone[1].upper()]
        letter = rf"\(?(?<![A-Za-z])([{self.letters}])(?![A-Za-z'’])\)?"
        text = re.sub(rf"\b(?:not|never)\s+(?:(?:the|option|choice)\s+)*{letter}", "", text).strip()
        second = rf"(?:(?:[\s.]*{OTHER})++\s*{letter}(?!(?<=[AI]){GOES_ON})|\s*\.\s*{letter}(?!\s+[a-z]))"
        several = re.match(rf"{letter}{second}+", text)
        first = re.match(rf"{letter}\s*(?:[.:,)]|$|\b(?:is|was|because|since|as)\b)", text)
        if several is None and first is not None:
            return [first[1]]
        chosen = re.finditer(rf"{letter}(?!(?<=I){GOES_ON})", text if several is None else several[0])
        return list(dict.fromkeys(match[1] for match in chosen))
