"""JSON that ends in a hash of itself: the text of `spec.json` and `manifest.json`.

The last field of the object, on a line of its own, is `sha256`: the hash of all bytes before this
line. So a flipped bit anywhere in the file is detected before a value is used.

Cost: a hash and a parse; one line an item, so that 100,000 shards take well under a second.
Guarantee: what `from_text` returns was written whole by `to_text`, or forged on purpose. JSON with
repeated names, NaN or unbounded numbers is refused; the caller checks types.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from kdcache.errors import CorruptCacheError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def to_text(values: Mapping[str, Any]) -> bytes:
    """The text of an object whose values are JSON-able; one line a field, and one an inner item."""
    lines = (f" {json.dumps(name)}: {_value(value)},\n" for name, value in values.items())
    body = ("{\n" + "".join(lines)).encode()
    return body + _seal(body)


def from_text(data: bytes, name: str) -> dict[str, Any]:
    """The object of a text, without its hash.

    Args:
        data: what a file holds.
        name: of the file, for messages.

    Raises:
        CorruptCacheError: the hash is not that of the text, or the text is not plain JSON.
    """
    body = data[: len(data) - len(_seal(b""))]
    if body + _seal(body) != data:
        raise CorruptCacheError(
            f"{name} has a wrong checksum: the file was changed or cut off. Restore it from a "
            "copy, or try `kdcache repair`."
        )
    try:
        values = json.loads(data, object_pairs_hook=_object, parse_constant=_refuse)
        if _SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is not text
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{name} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise CorruptCacheError(f"{name} cannot be read: it is not a JSON object.")
    del values["sha256"]
    return values


def _seal(body: bytes) -> bytes:
    return f' "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _value(value: Any) -> str:
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(name)}: {json.dumps(inner)}" for name, inner in value.items()]
        return "{\n  " + ",\n  ".join(items) + "\n }"
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    return json.dumps(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is repeated")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed")
