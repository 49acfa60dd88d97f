"""Knobs of frozen dataclasses that check themselves: a field says its default and its range in one line.

    @dataclass(frozen=True, slots=True)
    class SAE(Knobs):
        lam: float = number(0.95, low=0, high=1)

Every error says which knob, what was found, and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, field, fields
from functools import partial
from typing import Any

CHECK = "check"  # the key of a field's metadata


class Knobs:
    """Base of a frozen dataclass with fields made by `number`, `integer` and `choice`; it checks them when it is made.

    A class with rules between its fields extends `__post_init__`.

    Raises:
        ValueError: a knob is not in its range.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for knob in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if CHECK in knob.metadata:
                knob.metadata[CHECK](f"{type(self).__name__}.{knob.name}", getattr(self, knob.name))


def number(
    default: float | None = MISSING,  # type: ignore[assignment]
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above_low: bool = False,
    optional: bool = False,
) -> Any:
    """A finite number in [low, high], or in (low, high] with ``above_low``; None too if it is ``optional``."""
    return _field(default, partial(check_number, low=low, high=high, above_low=above_low), optional)


def integer(default: int | None = MISSING, *, low: int, optional: bool = False) -> Any:  # type: ignore[assignment]
    """An integer of at least ``low``; None too if it is ``optional``."""
    return _field(default, partial(check_integer, low=low), optional)


def choice(default: str = MISSING, *, allowed: Iterable[str]) -> Any:  # type: ignore[assignment]
    """One of some words."""
    return _field(default, partial(check_choice, allowed=tuple(allowed)), False)


def _field(default: object, check: Callable[[str, Any], None], optional: bool) -> Any:
    def unless_none(key: str, value: Any) -> None:
        if not (optional and value is None):
            check(key, value)

    return field(default=default, metadata={CHECK: unless_none})


def check_number(key: str, value: object, low: float, high: float = math.inf, *, above_low: bool = False) -> None:
    """Raises ValueError unless ``value`` is a finite number in [low, high], or in (low, high] with ``above_low``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and low <= value <= high and not (above_low and value == low)):  # type: ignore[operator]
        left = "(" if above_low or low == -math.inf else "["
        right = ")" if high == math.inf else "]"
        raise ValueError(f"{key} = {value!r}, but it must be a number in {left}{low:g}, {high:g}{right}")


def check_integer(key: str, value: object, low: int) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{key} = {value!r}, but it must be an integer of at least {low}")


def check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{key} = {value!r}, but it must be one of {', '.join(names)}")
