"""JSON that keeps types: tuples, sets, fractions, decimals, dates, and dictionaries whose keys are not text."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

TYPE = "__type__"  # marks a value that plain JSON cannot hold: {TYPE: its type, "of": its parts}

# Type -> (its parts, as a list or as text; the value of these parts). The first type that fits is used.
FORMS: dict[type[Any], tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    tuple: (list, tuple),
    set: (lambda value: sorted(value, key=repr), set),
    frozenset: (lambda value: sorted(value, key=repr), frozenset),
    dict: (lambda value: [list(pair) for pair in value.items()], dict),
    Fraction: (str, Fraction),
    Decimal: (str, Decimal),
    complex: (lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    datetime: (datetime.isoformat, datetime.fromisoformat),
    date: (date.isoformat, date.fromisoformat),
    time: (time.isoformat, time.fromisoformat),
    timedelta: (lambda value: [value.days, value.seconds, value.microseconds], lambda parts: timedelta(*parts)),
}
READERS = {kind.__name__: read for kind, (_, read) in FORMS.items()}


def dumps(value: Any) -> str:
    """The text. Raises TypeError with the place of a value whose type is not in `FORMS`."""
    return json.dumps(_encoded(value, "value"))


def loads(text: str) -> Any:
    """The value that `dumps` was given. Raises ValueError if `dumps` did not write the text."""
    return json.loads(text, object_hook=_decoded)


def _encoded(value: Any, where: str) -> Any:
    # numpy's numbers and text become Python's, which compare and print alike.
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [_encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and TYPE not in value and all(isinstance(key, str) for key in value):
        return {str(key): _encoded(item, f"{where}.{key}") for key, item in value.items()}
    for kind, (parts_of, _) in FORMS.items():
        if isinstance(value, kind):
            return {TYPE: kind.__name__, "of": _encoded(parts_of(value), where)}
    raise TypeError(f"{where} is {type(value).__module__}.{type(value).__name__}, which has no form in JSON")


def _decoded(node: dict[str, Any]) -> Any:
    if TYPE not in node:
        return node
    if node[TYPE] not in READERS:
        raise ValueError(f"{TYPE} {node[TYPE]!r} is unknown; known are {', '.join(READERS)}")
    return READERS[node[TYPE]](node["of"])
