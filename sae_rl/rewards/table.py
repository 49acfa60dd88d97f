"""Verifiers: programs that read a prompt, a response and an answer, and say how good the response is, and why.

To add one, write a frozen dataclass like `Exact` and put it in `VERIFIERS`. A function of your own needs no change here:
name it by its import path, ``package.module:function``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from sae_rl.rewards.choice import Choice
from sae_rl.rewards.code import Code
from sae_rl.rewards.exact import Exact
from sae_rl.rewards.functions import Function, imported
from sae_rl.rewards.http import Http
from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.math_verify import MathVerify
from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.reasoning_gym import ReasoningGym
from sae_rl.rewards.rules import Format, Language, Overlong, Repetition
from sae_rl.rewards.verdict import Timed, Verifier
from sae_rl.rewards.weighted import Weighted
from sae_rl.sandbox.isolation import Asked, Isolation, chosen

VERIFIERS: dict[str, type[Any]] = {
    "math": Math,
    "math_verify": MathVerify,
    "numeric": Numeric,
    "choice": Choice,
    "exact": Exact,
    "code": Code,
    "format": Format,
    "language": Language,
    "overlong": Overlong,
    "repetition": Repetition,
    "http": Http,
    "reasoning_gym": ReasoningGym,
    "function": Function,
    "weighted": Weighted,
}
# What a source, or a row of a file, may name without any configuration.
READY: dict[str, Verifier] = {
    "math": Math(),
    "math_verify": MathVerify(),
    "numeric": Numeric(),
    "choice": Choice(),
    "exact": Exact(),
    "code": Code(),
    "reasoning_gym": ReasoningGym(),
    "level": Function("sae_rl.tasks.level:level"),
    "countdown": Function("sae_rl.tasks.countdown:countdown"),
}


def resolve(name: str, configured: Mapping[str, Verifier]) -> Verifier:
    """The verifier of that name in ``rewards.verifiers``, or a ready one, or the function at that import path.

    Raises:
        ValueError: there is no such verifier, with the nearest name there is.
    """
    if name in configured:
        return configured[name]
    if name in READY:
        return READY[name]
    if ":" in name:
        imported(name)  # a misspelt path is said now, not in the middle of a step
        return Function(name)
    names = sorted({*READY, *configured})
    match = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    if name in VERIFIERS:
        hint = f"; {name!r} needs knobs: give it a name in rewards.verifiers"
    raise ValueError(f"reward: found {name!r}, allowed: {', '.join(names)}, or package.module:function{hint}")


def parts_of(verifier: Verifier) -> Iterator[Verifier]:
    """What a verifier is made of, itself included."""
    yield verifier
    if isinstance(verifier, Weighted):
        for part in verifier.parts:
            yield from parts_of(part)


def check_deadline(name: str, verifier: Verifier, deadline_s: float) -> None:
    """Raises ValueError if its own time limits are longer, so that a check would fail before it can say what is late."""
    limits = [part.longest() for part in parts_of(verifier) if isinstance(part, Timed)]
    longest_s = sum(limit.seconds for limit in limits)
    if longest_s > deadline_s:
        told = " and ".join(f"{limit.seconds:g} s by {limit.knobs}" for limit in limits)
        raise ValueError(
            f"reward {name!r} may take {longest_s:g} s ({told}), but rewards.deadline_s = {deadline_s:g}: raise it, or "
            "lower these in rewards.verifiers"
        )


def isolations_of(verifier: Verifier) -> dict[Asked, Isolation]:
    """How its programs run here, for processes that must not choose by themselves.

    Raises:
        OSError: they cannot run here.
    """
    return {part.isolation: chosen(part.isolation) for part in parts_of(verifier) if isinstance(part, Code)}


def warnings_of(verifiers: Iterable[Verifier]) -> list[str]:
    """What they cannot prevent on this machine, each once.

    Raises:
        OSError: one of them cannot work here.
    """
    parts = [part for verifier in verifiers for part in parts_of(verifier)]
    return list(dict.fromkeys(text for part in parts if isinstance(part, Code) for text in part.warnings()))
