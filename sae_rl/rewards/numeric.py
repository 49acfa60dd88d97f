"""Numbers within a tolerance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sae_rl.knobs import Knobs, number
from sae_rl.rewards.extraction.final_answer import final_answer
from sae_rl.rewards.extraction.markup import ascii_of, tidy
from sae_rl.rewards.extraction.numbers import Number
from sae_rl.rewards.math.answers import MAX_CHARS, read_answer
from sae_rl.rewards.verdict import Sample, Verdict

SEVERAL = re.compile(r",(?!\d{3})|;|\b(?:or|and)\b|\\(?:lor|vee|land|wedge)(?![A-Za-z])")  # between two equations


@dataclass(frozen=True, slots=True)
class Numeric(Knobs):
    """1 if the final answer is a number within ``max(absolute, relative * |answer|)`` of the right one.

    `final_answer` says what the final answer is. Thousands separators, percentages, scientific notation, fractions, currency
    signs and units are read; x % is x or x/100.
    """

    relative: float = number(1e-6, low=0)
    absolute: float = number(0.0, low=0)
    boxed_only: bool = False  # no answer without a box

    def read_answer(self, answer: str) -> Number:
        """The right answer. Raises ValueError if it is no number."""
        wanted = number_in(answer)
        if wanted is None:
            raise ValueError(f"numeric: the answer {answer[:80]!r} is not a number")
        return wanted

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError as `read_answer`."""
        wanted = self.read_answer(sample.answer)
        final = final_answer(sample.response, self.boxed_only)
        if final.problem:
            return Verdict(0.0, final.problem)
        found = number_in(final.text)
        if found is None:
            return Verdict(0.0, f"found {final.text[:80]}, which is not one number")
        one_unit = not found.unit or not wanted.unit or found.unit == wanted.unit
        pairs = [(found.value, wanted.value)]
        if found.percent != wanted.percent:
            pairs.append((found.plain, wanted.plain))
        right = one_unit and any(self.near(*pair) for pair in pairs)
        says = "is" if right else "is not"
        return Verdict(float(right), f"found {final.text[:80]}, which {says} {sample.answer.strip()[:80]}", str(found))

    def near(self, found: Fraction, wanted: Fraction) -> bool:
        return abs(found - wanted) <= max(Fraction(self.absolute), Fraction(self.relative) * abs(wanted))


def number_in(text: str) -> Number | None:
    """The number that a text is, behind the last sign of equality; None: it is none, or there are several."""
    if len(text) > MAX_CHARS:
        return None
    before, _, value = tidy(ascii_of(text)).rpartition("=")
    return None if SEVERAL.search(before.partition("=")[2]) else read_answer(value).number
