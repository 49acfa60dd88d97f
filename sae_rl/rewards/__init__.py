"""Verifiers: programs that read a prompt, a response and an answer, and say how good the response is.

To add one, write ``def mine(prompt: str, response: str, answer: str) -> float`` and put it in `REWARDS`, or name it by its
import path, ``package.module:mine``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import cast

from sae_rl.data.countdown import countdown
from sae_rl.data.level import level
from sae_rl.rewards.text import exact, math

Reward = Callable[[str, str, str], float]

REWARDS: dict[str, Reward] = {"level": level, "countdown": countdown, "math": math, "exact": exact}


def resolve_reward(name: str) -> Reward:
    """The verifier of that name, or at that import path.

    Raises:
        ValueError: there is no such verifier, with the nearest name there is.
    """
    if name in REWARDS:
        return REWARDS[name]
    if ":" in name:
        return _imported(name)
    nearest = get_close_matches(name, REWARDS, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(
        f"reward: found {name!r}, allowed: {', '.join(sorted(REWARDS))}, or an import path package.module:function{hint}"
    )


def _imported(path: str) -> Reward:
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"reward: cannot import {module_name!r} of {path!r}: {error}") from error
    function = getattr(module, function_name, None)
    if function is None:
        nearest = get_close_matches(function_name, vars(module), n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"reward: module {module_name!r} has no {function_name!r}{hint}")
    if not callable(function):
        raise ValueError(f"reward: {path!r} is {type(function).__name__}, not a function (prompt, response, answer)")
    return cast(Reward, function)
