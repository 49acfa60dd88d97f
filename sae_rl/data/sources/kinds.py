"""The kinds of sources by name. A new kind is a `Source` in a file of its own, and its line in `KINDS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

from pydantic import BeforeValidator, Discriminator, Tag

from sae_rl.data.sources.file import FileSource
from sae_rl.data.sources.procedural import ProceduralSource
from sae_rl.data.sources.reasoning_gym import ReasoningGymSource
from sae_rl.data.sources.source import Source
from sae_rl.settings import nearest, refuse_unknown_keys, union_tag
from sae_rl.tasks.table import TASKS

KINDS: dict[str, type[Source]] = {
    "file": FileSource,
    "reasoning_gym": ReasoningGymSource,
    **dict.fromkeys(TASKS, ProceduralSource),
}


def union_of(kinds: Mapping[str, type[Source]]) -> Any:
    """The type of a field that takes a source of any of these kinds, chosen by its key ``name``."""

    def check(node: Any) -> Any:
        if not isinstance(node, Mapping):
            raise ValueError(f"found {node!r}, but it must be a mapping with a name")
        if "name" not in node:
            raise ValueError(f"name is missing, allowed: {', '.join(kinds)}")
        if node["name"] not in kinds:
            raise ValueError(f"name {node['name']!r} is unknown, allowed: {', '.join(kinds)}")
        fields = kinds[node["name"]].model_fields
        refuse_unknown_keys(node, fields, lambda key: hint(key, fields))
        return node

    def hint(key: str, fields: Mapping[str, object]) -> str:
        if owners := [name for name, kind in kinds.items() if key in kind.model_fields]:
            return f"which is a key of name: {', '.join(owners)}; allowed: {', '.join(sorted(fields))}"
        return nearest(key, fields)

    def tag_of(node: Any) -> str:
        kind = type(node) if isinstance(node, Source) else kinds[node["name"]]  # pydantic writes sources with it, too
        return union_tag(kind.__name__)

    members = tuple(Annotated[kind, Tag(union_tag(kind.__name__))] for kind in dict.fromkeys(kinds.values()))
    return Annotated[Union[members], Discriminator(tag_of), BeforeValidator(check)]  # noqa: UP007 (made at run time)


if TYPE_CHECKING:
    PartSource: TypeAlias = Source
else:
    PartSource = union_of(KINDS)
