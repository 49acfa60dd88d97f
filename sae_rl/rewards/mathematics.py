"""Mathematical answers, compared by math-verify."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sae_rl.rewards.verdict import Sample, Verdict

BOXED = "\\boxed{"


@dataclass(frozen=True, slots=True)
class Math:
    r"""1 if the last ``\boxed{}`` of the response, or else its final expression, equals the answer mathematically."""

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ValueError if the answer is not mathematics, so that no response could be right."""
        from math_verify import parse, verify  # sympy takes seconds to import

        # math-verify's own deadline is signal.alarm, which only works in a main thread. The reward pool has the deadline,
        # so it is switched off here, and the warning about that with it.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        answer = sample.answer
        gold = parse(answer if "$" in answer or BOXED in answer else f"{BOXED}{answer}}}", parsing_timeout=None)
        if not gold:
            raise ValueError(f"math: the answer {answer!r} is not a number, an expression or a set")
        final = last_boxed(sample.response)
        found = parse(sample.response if final is None else f"{BOXED}{final}}}", parsing_timeout=None)
        if not found:
            return Verdict(0.0, "no answer was found")
        same = verify(gold, found, timeout_seconds=None)
        return Verdict(float(same), f"{found[-1]} {'equals' if same else 'is not'} {answer}", str(found[0]))


def last_boxed(response: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds; None: there is none."""
    start = response.rfind(BOXED)
    while start >= 0:
        depth = 1
        inside = response[start + len(BOXED) :]
        for i, character in enumerate(inside):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return inside[:i]
        start = response.rfind(BOXED, 0, start)
    return None
