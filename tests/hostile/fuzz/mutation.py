"""Changes to an input that keep its outer form: JSON stays JSON, so that the fuzzer gets behind the parser."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

#: Takes an input, the largest size that the result may have, and a generator; returns a changed input.
Mutate = Callable[[bytes, int, random.Random], bytes]

_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "\x00", "float32", "../x", [], {}, [0], [[]], {"": None}, "a" * 300,
)  # fmt: skip
_DEPTH = 50


def json_document(content: bytes, max_size: int, rng: random.Random) -> bytes:
    """A JSON document with some of its values, keys or items changed."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return damaged(content, max_size, rng)
    for _ in range(rng.randrange(1, 4)):
        value = _changed(value, rng)
    return json.dumps(value).encode(errors="surrogatepass")[:max_size]


def json_lines(content: bytes, max_size: int, rng: random.Random) -> bytes:
    """JSON lines with one of them changed, repeated or gone."""
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    action = rng.randrange(4)
    if action == 0:
        lines.insert(place, lines[place])
    elif action == 1 and len(lines) > 1:
        del lines[place]
    else:
        lines[place] = json_document(lines[place], max_size, rng)
    return b"\n".join(lines)[:max_size]


def safetensors_header(content: bytes, max_size: int, rng: random.Random) -> bytes:
    """A safetensors file whose header is changed as JSON and keeps its length field right."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        return damaged(content, max_size, rng)
    header = json_document(content[8 : 8 + length], max_size, rng)
    return (len(header).to_bytes(8, "little") + header + content[8 + length :])[:max_size]


def damaged(content: bytes, max_size: int, rng: random.Random) -> bytes:
    """Bytes overwritten, cut out, repeated or cut off."""
    changed = bytearray(content or b"\0")
    for _ in range(rng.randrange(1, 6)):
        place, action = rng.randrange(len(changed) + 1), rng.randrange(5)
        if action == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del changed[place : place + rng.randrange(1, 9)]
        elif action == 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif action == 3:
            start = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + rng.randrange(1, 65)]
        else:
            value = rng.choice([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
            changed[place : place + 8] = value.to_bytes(8, "little")
    return bytes(changed[:max_size])


def _changed(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """The value with one change somewhere in it."""
    inside = isinstance(value, (dict, list)) and value and depth < _DEPTH
    if not inside or rng.random() < 0.15:
        return _other(value, rng)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [_changed(item, rng, depth + 1) if i == place else item for i, item in enumerate(value)]
    key, action = rng.choice(list(value)), rng.randrange(8)
    if action == 0:
        return {k: v for k, v in value.items() if k != key}
    if action == 1:
        return {**value, str(_other(key, rng))[:300]: value[key]}
    return {**value, key: _changed(value[key], rng, depth + 1)}


def _other(value: Any, rng: random.Random) -> Any:
    """Another value in the place of one."""
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 7, 10**9, -(10**9)])
    if isinstance(value, str) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(["", "0", "-", ".", "/", "\u00e9", " "]) + value[place + rng.randrange(2) :]
    if isinstance(value, list) and rng.random() < 0.5:
        return value + value[:2]
    return rng.choice(_ODD)
