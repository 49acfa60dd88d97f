"""math-verify as it is, for runs that are compared with others that were rewarded by it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sae_rl.rewards.verdict import Sample, Verdict


@dataclass(frozen=True, slots=True)
class MathVerify:
    """1 if math-verify's ``verify(parse(answer), parse(response))`` says so, with its defaults.

    What it would swallow as "not equal", an exception or a timeout, is a failed check here.
    """

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError if the answer is no mathematics, so that no response could be right."""
        from math_verify import parse, verify  # sympy takes a second to import

        # Its own deadline is an alarm, which works in a main thread only; the reward pool has the deadline.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        is_marked = "$" in sample.answer or "\\boxed" in sample.answer
        gold = parse(
            sample.answer if is_marked else f"\\boxed{{{sample.answer}}}", parsing_timeout=None, raise_on_error=True
        )
        if not gold:
            raise ValueError(f"math_verify: the answer {sample.answer!r} is not a number, an expression or a set")
        found = parse(sample.response, parsing_timeout=None, raise_on_error=True)
        if not found:
            return Verdict(0.0, "no answer was found")
        is_right = verify(gold, found, timeout_seconds=None, raise_on_error=True)
        return Verdict(
            float(is_right),
            f"found {found[-1]}, which {'equals' if is_right else 'is not'} {sample.answer}",
            str(found[0]),
        )
