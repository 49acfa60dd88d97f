"""The kinds of sources by name. A new kind is a `Source` in a file of its own, and its line in `KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, SerializeAsAny

from sae_rl.data.sources.file import FileSource
from sae_rl.data.sources.procedural import ProceduralSource
from sae_rl.data.sources.reasoning_gym import ReasoningGymSource
from sae_rl.data.sources.source import Source
from sae_rl.names import nearest
from sae_rl.settings import refuse_unknown_keys
from sae_rl.tasks.table import TASKS

KINDS: dict[str, type[Source]] = {
    "file": FileSource,
    "reasoning_gym": ReasoningGymSource,
    **dict.fromkeys(TASKS, ProceduralSource),
}


def source_of(kinds: Mapping[str, type[Source]]) -> Callable[[Any], Source]:
    """A validator that builds a source of one of these kinds, chosen by its key ``name``."""

    def build(node: Any) -> Source:
        if not isinstance(node, Mapping):
            raise ValueError(f"found {node!r}, but it must be a mapping with a name")
        if "name" not in node:
            raise ValueError(f"name is missing, allowed: {', '.join(kinds)}")
        name = node["name"]
        kind = ProceduralSource if ":" in str(name) else kinds.get(name)
        if kind is None:
            raise ValueError(
                f"name {name!r} is unknown, allowed: {', '.join(kinds)}, or package.module:Class of a task"
            )
        refuse_unknown_keys(node, kind.model_fields, lambda key: hint(key, kind))
        return kind.model_validate(node)

    def hint(key: str, kind: type[Source]) -> str:
        if owners := [name for name, other in kinds.items() if key in other.model_fields]:
            return f"which is a key of name: {', '.join(owners)}; allowed: {', '.join(sorted(kind.model_fields))}"
        return nearest(key, kind.model_fields)

    return build


PartSource = Annotated[Source, PlainValidator(source_of(KINDS)), SerializeAsAny()]
