"""Verifiers that compare the end of a response with a written answer."""

from __future__ import annotations

import logging

BOXED = "\\boxed{"


def exact(prompt: str, response: str, answer: str) -> float:
    """1 if the response is the answer, white space at both ends aside."""
    return float(response.strip() == answer.strip())


def math(prompt: str, response: str, answer: str) -> float:
    r"""1 if the last ``\boxed{}`` of the response, or else its final expression, equals the answer mathematically.

    Raises:
        ValueError: the answer is not mathematics, so no response could be right.
    """
    from math_verify import parse, verify  # sympy takes seconds to import

    # math-verify's own deadline is signal.alarm, which only works in a main thread. The reward pool has the deadline,
    # so it is switched off here, and the warning about that with it.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = parse(answer if "$" in answer or BOXED in answer else f"{BOXED}{answer}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"reward math: the answer {answer!r} is not a number, an expression or a set")
    final = last_boxed(response)
    found = parse(response if final is None else f"{BOXED}{final}}}", parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


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
