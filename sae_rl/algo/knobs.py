"""Checks of knobs: every error says which key, what was found, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable


def check_number(key: str, value: object, low: float, high: float = math.inf, *, above_low: bool = False) -> None:
    """Raises ValueError unless ``value`` is a finite number in [low, high], or in (low, high] with ``above_low``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and low <= value <= high and not (above_low and value == low)):  # type: ignore[operator]
        interval = f"{'(' if above_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{key} = {value!r}, but it must be a number in {interval}")


def check_integer(key: str, value: object, low: int) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{key} = {value!r}, but it must be an integer of at least {low}")


def check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{key} = {value!r}, but it must be one of {', '.join(names)}")
