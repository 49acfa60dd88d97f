"""What every part of a configuration is: frozen, typed, and without keys that it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sae_rl.plugins import UNKNOWN_KEY, nearest

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, node: Any) -> Any:
        if isinstance(node, Mapping) and (unknown := [key for key in node if key not in cls.model_fields]):
            problem = "; ".join(f"has no {key!r}, {cls.hint(str(key))}" for key in unknown)
            raise PydanticCustomError(UNKNOWN_KEY, "{problem}", {"problem": problem})
        return node

    @classmethod
    def hint(cls, key: str) -> str:
        """What to write instead of a key that is not there."""
        return nearest(key, list(cls.model_fields))
