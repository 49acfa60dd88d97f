"""Prompts from several sources: by weight in training, all of them in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from sae_rl.data.loader import Loader
from sae_rl.data.mixture import MixtureSampler
from sae_rl.data.sampler import PromptSampler
from sae_rl.data.sources.kinds import PartSource
from sae_rl.data.sources.source import Source
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt


class MixtureSource(Source):
    name: Literal["mixture"]
    parts: dict[str, PartSource]

    @field_validator("parts", mode="before")
    @classmethod
    def _parts_have_names(cls, parts: Any) -> Any:
        if isinstance(parts, Mapping) and not parts:
            raise ValueError("a mixture needs at least one part")
        for name, part in parts.items() if isinstance(parts, Mapping) else ():
            if "/" in str(name):
                raise ValueError(
                    f"the name {name!r} of a part may not hold '/', which separates it from ids of prompts"
                )
            if isinstance(part, Mapping) and part.get("name") == "mixture":
                raise ValueError(f"part {name!r} is a mixture itself: list its parts here, with weights of their own")
        return parts

    def prompts(self, loader: Loader) -> list[Prompt]:
        loaders = {name: loader.of_part(name) for name in self.parts}
        return [prompt for name, part in self.parts.items() for prompt in part.prompts(loaders[name])]

    def sampler(self, loader: Loader, seed: int) -> PromptSampler | None:
        weights = {name: 1.0 if part.weight is None else part.weight for name, part in self.parts.items()}
        total = sum(weights.values())
        parts = {
            name: part.sampler(loader.of_part(name, weights[name] / total), derive_seed(seed, name))
            for name, part in self.parts.items()
        }
        loaded = {name: part for name, part in parts.items() if part is not None}
        return MixtureSampler(loaded, weights) if len(loaded) == len(parts) else None
