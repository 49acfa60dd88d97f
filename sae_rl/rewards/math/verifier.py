"""The verifier of mathematical answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from sae_rl.rewards.extraction.final_answer import BOX, FinalAnswer, final_answer
from sae_rl.rewards.math.answers import NUM_REMEMBERED, Answer, read_answer
from sae_rl.rewards.math.equality import right
from sae_rl.rewards.verdict import Sample, Verdict

MAX_SHOWN = 80  # characters of an answer in a verdict's reasons


@dataclass(frozen=True, slots=True)
class Math:
    r"""1 if the final answer equals the right one mathematically, or one of those in a JSON list of texts.

    `final_answer` says what the final answer is. A decimal of at least ``precision`` significant digits equals what it is
    rounded or cut off from; fewer digits must be exact. A unit may be left out, and x % is x or x/100.
    """

    precision: int = 6
    boxed_only: bool = False  # no answer without a box

    def __post_init__(self) -> None:
        if self.precision < 1:
            raise ValueError(f"Math.precision = {self.precision}, but it must be at least 1, in significant digits")

    def read_answer(self, answer: str) -> tuple[Answer, ...]:
        """The right answers. Raises ValueError as `golds`."""
        return golds(answer)

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError if the right answer is broken, so that no response could be right."""
        wanted = self.read_answer(sample.answer)
        final = final_answer(sample.response, self.boxed_only)
        if not final.boxed and not self.boxed_only and sample.response.strip() == sample.answer.strip():
            final = FinalAnswer(sample.answer, boxed=False)
        if final.problem:
            return Verdict(0.0, final.problem)
        found = read_answer(final.text)
        same_as = next((gold for gold in wanted if right(gold, found, self.precision)), None)
        why = f"found {shown(final.text)}"
        if same_as is not None:
            return Verdict(1.0, f"{why}, which equals {shown(same_as.text)}", same_as.canonical)
        if not found.says_something or found.problem:
            problem = f"but {found.problem}" if found.problem else "which is no mathematics"
            return Verdict(0.0, f"{why}, {problem}", shown(final.text))
        none = "none of" if len(wanted) > 1 else "not"
        return Verdict(0.0, f"{why}, which is {none} {', '.join(shown(gold.text) for gold in wanted)}", found.canonical)


@lru_cache(maxsize=NUM_REMEMBERED)
def golds(answer: str) -> tuple[Answer, ...]:
    """The right answers: one, or those of a JSON list of texts. Raises ValueError if one cannot be compared."""
    try:
        listed = json.loads(answer) if answer.lstrip().startswith('["') else [answer]
    except json.JSONDecodeError:
        listed = [answer]
    return tuple(map(_gold, listed if all(isinstance(each, str) for each in listed) else [answer]))


def _gold(answer: str) -> Answer:
    """The answer as it is, or the final answer of a solution."""
    found = read_answer(answer)
    if BOX.search(answer) or "####" in answer or ("$" in answer and not found.says_something):
        found = read_answer(final_answer(answer).text)
    if not found.says_something:
        problem = found.problem and f"cannot be compared: {found.problem}"
        problem = problem or "is not a number, an expression, a set or words"
        raise ValueError(f"math: the answer {shown(answer)!r} {problem}")
    return found


def shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 10]}...{text[-7:]}"
