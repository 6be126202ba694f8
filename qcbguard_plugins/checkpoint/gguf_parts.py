"""GGUF files that are one part of several: all parts are read, or none."""

from __future__ import annotations

import re
from pathlib import Path

from qcbguard_plugins.checkpoint.gguf_reader import GgufFile, open_gguf
from qcbguard_plugins.errors import CheckpointError

# What llama.cpp asks of the names of parts; the numbers begin at 1, those in the headers at 0.
_PART_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MERGE = "llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf"


def open_parts(path: Path | str) -> list[GgufFile]:
    """Open a GGUF file and, where it is one part of several, all of them.

    Args:
        path: A whole file, or any part.

    Raises:
        CheckpointError: A file is malformed, parts are missing, or names and headers of parts disagree.
    """
    file = open_gguf(path)
    number, count = _place(file)
    named = _PART_NAME.fullmatch(file.path.name)
    if count == 1:
        if named and int(named["count"]) != 1:
            raise CheckpointError(
                f"{file.path.name} is named as one part of {int(named['count'])}, and its header says that it is whole",
                remedy="Rename the file if it is whole, so that no loader looks for the other parts.",
            )
        return [file]
    if named is None or (int(named["number"]), int(named["count"])) != (number + 1, count):
        raise CheckpointError(
            f"the header of {file.path.name} says that it is part {number + 1} of {count}, and its name does not",
            remedy=f"Give the parts the names that llama-gguf-split gave them, or merge them: {_MERGE}",
        )
    paths = [file.path.with_name(f"{named['prefix']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [path.name for path in paths if path != file.path and not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{file.path.name} is one part of {count}, and {len(missing)} parts are missing",
            details=missing,
            remedy="Download the missing parts into the same folder.",
        )
    parts = [file if path == file.path else open_gguf(path) for path in paths]
    _require_one_model(parts)
    return parts


def require_whole(file: GgufFile) -> None:
    """Refuse one part of several.

    Raises:
        CheckpointError: It is one.
    """
    _, count = _place(file)
    if count > 1:
        raise CheckpointError(f"{file.path.name} is one part of {count}", remedy=f"Merge them first: {_MERGE}")
    open_parts(file.path)


def _place(file: GgufFile) -> tuple[int, int]:
    """The number of a part by its header, beginning at 0, and the number of parts."""
    number, count = (file.metadata.get(key, default) for key, default in (("split.no", 0), ("split.count", 1)))
    # llama.cpp takes 0 parts for a whole file too.
    if not isinstance(number, int) or not isinstance(count, int) or not 0 <= number < max(count, 1):
        raise CheckpointError(f"{file.path.name}: its header says that it is part {number!r} of {count!r}")
    return number, max(count, 1)


def _require_one_model(parts: list[GgufFile]) -> None:
    seen: dict[str, str] = {}
    for place, part in enumerate(parts):
        number, count = _place(part)
        if (number, count) != (place, len(parts)):
            raise CheckpointError(
                f"{part.path.name}: its header says that it is part {number + 1} of {count}",
                remedy="The parts are not of one model, or were renamed: download them again.",
            )
        for name in part.tensors:
            if name in seen:
                raise CheckpointError(f"{name} is stored in both {seen[name]} and {part.path.name}")
            seen[name] = part.path.name
    for part in parts:
        total = part.metadata.get("split.tensors.count", len(seen))
        if total != len(seen):
            raise CheckpointError(
                f"{part.path.name}: its header says that the parts hold {total} tensors, and they hold {len(seen)}",
                remedy="The parts are not of one model: download them again.",
            )
