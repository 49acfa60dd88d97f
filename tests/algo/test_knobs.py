"""Fields that check themselves, and what their errors say."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest

from sae_rl.knobs import Knobs, choice, flag, integer, number


@dataclass(frozen=True, slots=True)
class Example(Knobs):
    required: int = integer(low=2)
    rate: float = number(0.5, low=0, high=1)
    scale: float | None = number(None, low=0, above_low=True, optional=True)
    count: int | None = integer(None, low=1, optional=True)
    mode: str = choice("fast", allowed=("fast", "exact"))
    on: bool = flag(True)

    def check_together(self) -> None:
        if self.mode == "exact" and self.count is None:
            raise ValueError("Example.mode = 'exact' needs count")


def test_values_in_range_are_kept() -> None:
    example = Example(2, 1, 1e-9, 1, "exact", False)
    assert [getattr(example, field.name) for field in fields(example)] == [2, 1, 1e-9, 1, "exact", False]
    assert Example(3) == Example(3, 0.5, None, None, "fast", True)
    with pytest.raises(TypeError, match="required"):
        Example()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"required": 1}, r"Example.required = 1, but it must be an integer of at least 2"),
        ({"required": None}, r"Example.required = None, but it must be an integer"),
        ({"required": True}, r"Example.required = True, but it must be an integer"),
        ({"rate": 1.5}, r"Example.rate = 1.5, but it must be a number in \[0, 1\]"),
        ({"rate": None}, r"Example.rate = None"),
        ({"rate": math.nan}, r"Example.rate = nan"),
        ({"scale": 0}, r"Example.scale = 0, but it must be a number in \(0, inf\)"),
        ({"scale": math.inf}, r"Example.scale = inf"),
        ({"count": 0}, r"Example.count = 0"),
        ({"mode": "slow"}, r"Example.mode = 'slow', but it must be one of fast, exact"),
        ({"on": 1}, r"Example.on = 1, but it must be true or false"),
        ({"mode": "exact"}, r"Example.mode = 'exact' needs count"),
    ],
)
def test_others_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Example(**({"required": 2} | knobs))
