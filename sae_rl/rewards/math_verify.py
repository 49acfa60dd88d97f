"""math-verify as it is, for runs that are compared with others that were rewarded by it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sae_rl.rewards.verdict import Sample, Verdict


@dataclass(frozen=True, slots=True)
class MathVerify:
    """1 if math-verify's ``verify(parse(answer), parse(response))`` says so, with its defaults.

    What it would swallow as "not equal", an exception or a timeout, is a failed check here.
    """

    def read_answer(self, answer: str, timeout_s: int | None = 5) -> list[Any]:
        """The right answer. Raises ValueError if it is no mathematics, and whatever the library raises.

        Args:
            timeout_s: the library's own deadline, an alarm, which works in a main thread only; None: none.
        """
        from math_verify import parse  # sympy takes a second to import

        logging.getLogger("math_verify").setLevel(logging.ERROR)
        marked = answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
        gold: list[Any] = parse(marked, parsing_timeout=timeout_s, raise_on_error=True)
        if not gold:
            raise ValueError(f"math_verify: the answer {answer!r} is not a number, an expression or a set")
        return gold

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError if the answer is no mathematics, so that no response could be right."""
        from math_verify import parse, verify

        gold = self.read_answer(sample.answer, timeout_s=None)  # the reward pool has the deadline
        found = parse(sample.response, parsing_timeout=None, raise_on_error=True)
        if not found:
            return Verdict(0.0, "no answer was found")
        is_right = verify(gold, found, timeout_seconds=None, raise_on_error=True)
        return Verdict(
            float(is_right),
            f"found {found[-1]}, which {'equals' if is_right else 'is not'} {sample.answer}",
            str(found[0]),
        )
