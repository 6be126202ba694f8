"""Files with one JSON value a line, read without trust."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcbguard_plugins.errors import QcbguardError


def read_json_lines(path: Path, error_type: type[QcbguardError], what: str) -> Iterator[tuple[int, Any]]:
    """Read a file line by line; blank lines are passed over.

    Args:
        path: The file, in UTF-8.
        error_type: What to raise.
        what: What to call the file in a message.

    Yields:
        The number of each line, from 1, and its value. Every text in it can be encoded again.

    Raises:
        QcbguardError: Of the given type; the file cannot be read, or a line is not JSON.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise error_type(f"{what} {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            # An escape such as \ud800 stands for half a character, which no tokenizer takes.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise error_type(f"{path.name}, line {number}: {error}") from error
        yield number, value
