"""Rewards that any model earns sometimes."""

from sae_rl.rewards.verdict import Verdict


def parity(prompt: str, response: str, answer: str) -> float:
    """1 if the response has an even number of decision words."""
    return float(sum(word.startswith("A") for word in response.split()) % 2 == 0)


def remainder(prompt: str, response: str, answer: str) -> Verdict:
    """A response answers with its number of decision words modulo 3: 1 is right, and 0 counts as no answer."""
    found = sum(word.startswith("A") for word in response.split()) % 3
    return Verdict(float(found == 1), f"remainder {found} <b>", str(found) if found else None)
