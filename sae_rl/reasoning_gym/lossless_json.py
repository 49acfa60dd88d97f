"""JSON that gives back what it was made from: tuples stay tuples, fractions fractions, and keys need not be text."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

TYPE = "__type__"  # the key that marks what JSON has no form for


def dumps(value: Any) -> str:
    """The text.

    Raises:
        TypeError: a value of a type that has no form here, with its place.
    """
    return json.dumps(_encoded(value, "value"))


def loads(text: str) -> Any:
    """What `dumps` was given. Raises ValueError if the text is not of that form."""
    return json.loads(text, object_hook=_decoded)


def _encoded(value: Any, where: str) -> Any:
    # numpy's numbers and text are turned into Python's, which compare and print alike.
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [_encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if TYPE not in value and all(isinstance(key, str) for key in value):
            return {str(key): _encoded(item, f"{where}.{key}") for key, item in value.items()}
        pairs = [[_encoded(key, where), _encoded(item, f"{where}.{key}")] for key, item in value.items()]
        return {TYPE: "dict", "of": pairs}
    if isinstance(value, tuple | set | frozenset):
        items = value if isinstance(value, tuple) else sorted(value, key=repr)
        name = "tuple" if isinstance(value, tuple) else type(value).__name__
        return {TYPE: name, "of": [_encoded(item, f"{where}[{i}]") for i, item in enumerate(items)]}
    if isinstance(value, Fraction | Decimal):
        return {TYPE: type(value).__name__, "of": str(value)}
    if isinstance(value, complex):
        return {TYPE: "complex", "of": [value.real, value.imag]}
    if isinstance(value, datetime | date | time):
        return {TYPE: type(value).__name__, "of": value.isoformat()}
    if isinstance(value, timedelta):
        return {TYPE: "timedelta", "of": [value.days, value.seconds, value.microseconds]}
    raise TypeError(f"{where} is {type(value).__module__}.{type(value).__name__}, which has no form in JSON")


READERS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Fraction": Fraction,
    "Decimal": Decimal,
    "complex": lambda parts: complex(*parts),
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda parts: timedelta(*parts),
}


def _decoded(node: dict[str, Any]) -> Any:
    if TYPE not in node:
        return node
    if node[TYPE] not in READERS:
        raise ValueError(f"{TYPE} {node[TYPE]!r} is unknown; known are {', '.join(READERS)}")
    return READERS[node[TYPE]](node["of"])
