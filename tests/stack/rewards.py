"""Rewards that any model earns sometimes."""

import os
from pathlib import Path

from sae_rl.rewards.verdict import Verdict

CHECKS = "SAE_RL_TEST_CHECKS"  # names a file that gets a character for each check of `parity`


def parity(prompt: str, response: str, answer: str) -> float:
    """1 if the response has an even number of decision words."""
    if CHECKS in os.environ:
        with Path(os.environ[CHECKS]).open("a") as checks:
            checks.write(".")
    return float(sum(word.startswith("A") for word in response.split()) % 2 == 0)


def remainder(prompt: str, response: str, answer: str) -> Verdict:
    """A response answers with its number of decision words modulo 3: 1 is right, and 0 counts as no answer."""
    found = sum(word.startswith("A") for word in response.split()) % 3
    return Verdict(float(found == 1), f"remainder {found} <b>", str(found) if found else None)
