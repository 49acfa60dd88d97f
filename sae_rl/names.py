"""Names that users write: the nearest of the known ones, and objects by their import path."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from sae_rl.plugins import place_in, said


def nearest(word: str, allowed: Iterable[str]) -> str:
    """ "did you mean 'x'?", or all that is allowed if nothing is near."""
    names = sorted(set(allowed))
    match = get_close_matches(word, names, n=1)
    return f"did you mean {match[0]!r}?" if match else f"allowed: {', '.join(names)}"


def imported(path: str) -> Any:
    """The object at ``package.module:name``. Raises ValueError if there is none, or if its module cannot be imported."""
    module, _, name = path.partition(":")
    try:
        found = vars(importlib.import_module(module))
    except Exception as error:  # a user's module may raise anything
        place = place_in(error, module)
        advice = "; put its folder into PYTHONPATH" if isinstance(error, ModuleNotFoundError) and not place else ""
        told = f"{place}: {said(error)}" if place else str(error)
        raise ValueError(f"cannot import {path!r}: {told}{advice}") from error
    if name not in found:
        raise ValueError(f"cannot import {path!r}: module {module} has no {name!r}, {nearest(name, found)}")
    return found[name]
