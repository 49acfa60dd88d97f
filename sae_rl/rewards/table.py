"""The verifiers by name.

To add one, write a frozen dataclass like `Exact` in a file of this folder that has its name, and enter it in `VERIFIERS`.
A user's function needs no entry: its name is its import path, ``package.module:function``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sae_rl.names import unknown_member
from sae_rl.rewards.choice import Choice
from sae_rl.rewards.code import Code
from sae_rl.rewards.exact import Exact
from sae_rl.rewards.format import Format
from sae_rl.rewards.function import Function
from sae_rl.rewards.http import Http
from sae_rl.rewards.math.verifier import Math
from sae_rl.rewards.math_verify import MathVerify
from sae_rl.rewards.numeric import Numeric
from sae_rl.rewards.reasoning_gym import ReasoningGym
from sae_rl.rewards.verdict import ReadsAnswers, Timed, Verifier, shown
from sae_rl.rewards.weighted import Weighted
from sae_rl.sandbox.probe import chosen

VERIFIERS: dict[str, type[Any]] = {
    "math": Math,
    "math_verify": MathVerify,
    "numeric": Numeric,
    "choice": Choice,
    "exact": Exact,
    "code": Code,
    "format": Format,
    "http": Http,
    "reasoning_gym": ReasoningGym,
    "function": Function,
    "weighted": Weighted,
}

OF_ONE_TEXT = (Exact, Choice, Numeric, MathVerify)  # they compare a response with one text or number

READY: dict[str, Verifier] = {  # what a source, or a row of a file, may name without any configuration
    "level": Function("sae_rl.tasks.level:level"),
    "countdown": Function("sae_rl.tasks.countdown:countdown"),
}
for _name, _verifier in VERIFIERS.items():
    with contextlib.suppress(TypeError, ValueError):  # a knob is missing, or the defaults alone mean nothing
        READY[_name] = _verifier()


def resolve(name: str, configured: Mapping[str, Verifier]) -> Verifier:
    """The verifier of that name in ``rewards.verifiers``, or else in `READY`, or else the function at that import path.

    Raises ValueError with the nearest name if there is none.
    """
    if name in configured:
        return configured[name]
    if name in READY:
        return READY[name]
    if ":" in name:
        function = Function(name)
        function.function()  # raises for a misspelt path now, before any check
        return function
    if name in VERIFIERS:
        raise ValueError(f"{name!r} needs knobs: give it a name in rewards.verifiers")
    raise ValueError(f"{unknown_member(name, {*READY, *configured})}, or package.module:function")


def parts_of(verifier: Verifier) -> Iterator[Verifier]:
    """A verifier, and all verifiers that it is made of."""
    yield verifier
    if isinstance(verifier, Weighted):
        for part in verifier.parts:
            yield from parts_of(part)


def runs_programs(verifier: Verifier) -> bool:
    """Whether a verifier runs programs that a model wrote."""
    return any(isinstance(part, Code) for part in parts_of(verifier))


def check_answer(verifier: Verifier, answer: str, *, is_json: bool) -> None:
    """Raises ValueError if a verifier, or a part of it, cannot read a right answer.

    Args:
        is_json: the answer is a list, an object, true or false as JSON. Most verifiers compare with one text.
    """
    for part in parts_of(verifier):
        if is_json and (isinstance(part, OF_ONE_TEXT) or (isinstance(part, Math) and not _is_list_of_texts(answer))):
            wanted = "a text, a number or a list of texts" if isinstance(part, Math) else "a text or a number"
            raise ValueError(f"{type(part).__name__.lower()}: the answer must be {wanted}, found {shown(answer)}")
        if isinstance(part, ReadsAnswers):
            try:
                part.read_answer(answer)
            except Exception as error:  # a library's, or a user's class; their checks would fail with it
                raise ValueError(str(error) if isinstance(error, ValueError) else repr(error)) from error


def _is_list_of_texts(answer: str) -> bool:
    listed = json.loads(answer)
    return isinstance(listed, list) and bool(listed) and all(isinstance(each, str) for each in listed)


def check_verifier(name: str, verifier: Verifier, deadline_s: float) -> None:
    """Raises ValueError if a verifier's own time limits exceed the deadline, or this machine cannot isolate its programs."""
    limits = [part.time_limit() for part in parts_of(verifier) if isinstance(part, Timed)]
    longest_s = sum(limit.seconds for limit in limits)
    if longest_s > deadline_s:
        told = " and ".join(f"{limit.seconds:g} s by {limit.knobs}" for limit in limits)
        raise ValueError(
            f"{name!r} may take {longest_s:g} s ({told}), but rewards.deadline_s = {deadline_s:g}: raise it, or "
            "lower these in rewards.verifiers"
        )
    if runs_programs(verifier):
        try:
            chosen()
        except OSError as error:
            raise ValueError(f"{name!r}: {error}") from error
