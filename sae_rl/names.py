"""Names that users write: the nearest of the known ones, and objects by their import path."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from sae_rl.plugins import place_in, said

NEAREST = ("did you mean", "allowed")  # how the hints of `nearest` begin
MAX_PATHS = 5  # that one message lists


def nearest(word: str, allowed: Iterable[str]) -> str:
    """ "did you mean 'x'?", or all that is allowed if nothing is near."""
    names = sorted(set(allowed))
    match = get_close_matches(word, names, n=1)
    return f"did you mean {match[0]!r}?" if match else f"allowed: {', '.join(names)}"


def paths_to(key: str, paths: Iterable[str]) -> str:
    """ "did you mean" the full paths, such as ``rollout.group_size``, that end with ``key``; empty: there are none."""
    found = [path for path in paths if path == key or path.endswith((f".{key}", f"/{key}"))][:MAX_PATHS]
    return f"did you mean {' or '.join(found)}?" if found else ""


def unknown_member(name: str, allowed: Iterable[str]) -> str:
    """The message about a name that is none of the known ones, and is perhaps an import path with a dot for its colon."""
    module, dot, last = name.rpartition(".")
    hint = (
        f"write {module}:{last} for {last} of the module {module}"
        if module and dot and last
        else nearest(name, allowed)
    )
    return f"name {name!r} is unknown, {hint}"


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
