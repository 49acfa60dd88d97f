"""What a page with a viewer holds, unpacked by other means than the page's script."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from typing import Any


def data_of(html: str) -> dict[str, Any]:
    """The JSON that the script reads; a browser ends the element at the first ``</script``, as this does."""
    found = re.search(r'<script type="application/json" id="viewer-data">(.*?)</script', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def _unpacked(text: str, kind: str) -> list[Any]:
    planes = zlib.decompress(base64.b64decode(text))
    count = len(planes) // 4
    return [struct.unpack(f"<{kind}", planes[i::count])[0] for i in range(count)]


def texts_of(data: dict[str, Any], response: dict[str, Any]) -> list[str]:
    pieces = _unpacked(response["tokens"], "I")[: response["length"]]
    return [data["texts"][piece] for piece in pieces]


def numbers_of(data: dict[str, Any], response: dict[str, Any]) -> dict[str, list[float]]:
    """The numbers of each token of a response by the label of their column."""
    length, flat = response["length"], _unpacked(response["numbers"], "f")
    return {column["label"]: flat[i * length : (i + 1) * length] for i, column in enumerate(data["columns"])}
