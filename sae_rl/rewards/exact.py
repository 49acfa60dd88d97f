"""Answers that are compared as text."""

from __future__ import annotations

from dataclasses import dataclass

from sae_rl.rewards.verdict import Sample, Verdict


@dataclass(frozen=True, slots=True)
class Exact:
    """1 if the whole response is the answer, apart from white space at both ends."""

    ignore_case: bool = False

    def read_answer(self, answer: str) -> None:
        """Raises ValueError for an empty answer, which an empty response would equal."""
        if not answer.strip():
            raise ValueError("exact: the answer is empty")

    def __call__(self, sample: Sample) -> Verdict:
        found, wanted = sample.response.strip(), sample.answer.strip()
        if self.ignore_case:
            found, wanted = found.casefold(), wanted.casefold()
        return Verdict(1.0, "equal", found) if found == wanted else Verdict(0.0, "not equal", found)
