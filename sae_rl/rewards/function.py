"""A user's function as a verifier."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sae_rl.rewards.verdict import Sample, Verdict


@dataclass(frozen=True, slots=True)
class Function:
    """What a function ``(prompt, response, answer)`` returns, a number or a `Verdict`."""

    path: str  # package.module:function

    def __call__(self, sample: Sample) -> Verdict:
        returned = imported(self.path)(sample.prompt, sample.response, sample.answer)
        if isinstance(returned, Verdict):
            return returned
        return Verdict(float(returned), f"{self.path} says {float(returned):g}")


def imported(path: str) -> Callable[..., Any]:
    """The function at an import path. Raises ValueError with the nearest name if there is none."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"reward: cannot import {module_name!r} of {path!r}: {error}") from error
    found = vars(module)
    if name not in found:
        raise ValueError(f"reward: module {module_name!r} has no {name!r}{did_you_mean(name, found)}")
    if not callable(found[name]):
        raise ValueError(f"reward: {path!r} is {type(found[name]).__name__}, not a function (prompt, response, answer)")
    function: Callable[..., Any] = found[name]
    return function


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name; empty if none of the names is near."""
    match = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
