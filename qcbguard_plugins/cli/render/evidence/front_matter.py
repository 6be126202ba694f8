"""Add to the README.md of a model without losing a byte of it: front matter, and a section between two markers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qcbguard_plugins.errors import CheckpointError, MissingDependencyError

_END: Final = b"<!-- qcbguard:end -->"
_BEGIN = re.compile(rb"<!-- qcbguard:begin sha256=([0-9a-f]{64}) -->")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Where the hub's own library looks for front matter.
_BLOCK = re.compile(rb"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")

# Bytes to put in, by their offset in the original.
_Insertions = list[tuple[int, bytes]]


def merge_card(original: bytes, fields: Mapping[str, str], tags: Sequence[str], section: str) -> bytes:
    """A model card with more in it.

    Every byte of the original stays, in its order, except those of a section that an earlier call added.

    Args:
        original: The card; empty where there is none.
        fields: Keys of the front matter and their values.
        tags: What the list of tags must contain.
        section: Markdown, put at the end, or in the place of an earlier one.

    Raises:
        CheckpointError: The card says something else under one of the keys, its front matter cannot be added to, or the
            section was edited by hand.
        MissingDependencyError: PyYAML is missing.
    """
    line_break = b"\r\n" if original.partition(b"\n")[0].endswith(b"\r") else b"\n"
    insertions = _front_matter(original, fields, tags, line_break)
    start, end = _earlier_section(original)
    body = line_break + line_break.join(section.strip("\n").encode().split(b"\n")) + line_break
    marked = f"<!-- qcbguard:begin sha256={hashlib.sha256(body).hexdigest()} -->".encode() + body + _END
    if start == end:
        before = b"" if not original or original.endswith(b"\n") else line_break
        marked = before + line_break + marked + line_break
    pieces, at = [], 0
    for offset, data in sorted(insertions):
        pieces += [original[at:offset], data]
        at = offset
    return b"".join([*pieces, original[at:start], marked, original[end:]])


def _earlier_section(original: bytes) -> tuple[int, int]:
    """Where the section of an earlier call lies; the end of the card, twice, where there is none."""
    begins, ends = list(_BEGIN.finditer(original)), [match.start() for match in re.finditer(_END, original)]
    if not begins and not ends and b"<!-- qcbguard:begin" not in original:
        return len(original), len(original)
    inner = original[begins[0].end() : ends[0]] if len(begins) == len(ends) == 1 else b""
    if not inner or hashlib.sha256(inner).hexdigest().encode() != begins[0][1]:
        raise CheckpointError(
            "the section between the qcbguard markers of the card was edited by hand",
            remedy="Move your text out of it and delete the rest with both markers; a new one is then added.",
        )
    return begins[0].start(), ends[0] + len(_END)


def _front_matter(original: bytes, fields: Mapping[str, str], tags: Sequence[str], line_break: bytes) -> _Insertions:
    yaml = _require_yaml()
    if original.startswith(_BYTE_ORDER_MARK + b"---"):
        raise CheckpointError(
            "the card starts with a byte order mark, so the hub does not see its front matter",
            remedy="Save it as UTF-8 without one.",
        )
    block = _BLOCK.search(original)
    if block is None:
        lines = [*(f"{name}: {_quoted(value)}" for name, value in fields.items()), *_tag_lines(tags)]
        return [(0, line_break.join(line.encode() for line in ["---", *lines, "---", ""]))]
    try:
        text = block[2].decode("utf-8")
        before = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the front matter of the card cannot be read: {error}") from error
    wanted = _expected({} if before is None else before, fields, tags)
    places = _places(text, node, before or {}, fields, tags, line_break.decode())
    after = text
    for index, added in sorted(places, reverse=True):
        after = after[:index] + added + after[index:]
    try:
        same = yaml.safe_load(after) == wanted
    except (yaml.YAMLError, ValueError, RecursionError):
        same = False
    if not same:
        raise CheckpointError(
            "the front matter of the card cannot be added to without a change to the rest",
            details=[f"{name}: {value}" for name, value in fields.items()] + [f"tags: {tag}" for tag in tags],
            remedy="Write these lines into it, one key per line, and run the command again.",
        )
    return [(block.start(2) + len(text[:index].encode()), added.encode()) for index, added in places]


def _expected(before: Any, fields: Mapping[str, str], tags: Sequence[str]) -> dict[str, Any]:
    """What the front matter must say afterwards.

    Raises:
        CheckpointError: It says something else already.
    """
    if not isinstance(before, dict):
        raise CheckpointError("the front matter of the card is no mapping of keys to values")
    for name, value in fields.items():
        said = before.get(name, value)
        if said != value and not (isinstance(said, list) and value in said):
            raise CheckpointError(
                f"the card says {name}: {said!r} already, and this model's is {value!r}",
                remedy="A card that was copied from the base describes the base. Correct that line and run again.",
            )
    old_tags = before.get("tags") or []
    if not isinstance(old_tags, list):
        raise CheckpointError("the tags of the card are no list", remedy="Write them as a list and run again.")
    return {**dict(fields), **before, "tags": [*(tag for tag in tags if tag not in old_tags), *old_tags]}


def _places(
    text: str, node: Any, before: Mapping[str, Any], fields: Mapping[str, str], tags: Sequence[str], line_break: str
) -> list[tuple[int, str]]:
    """Where in the front matter to put what is missing: before its first key, and before its first tag."""
    mark = None if node is None else node.start_mark
    indent = " " * (mark.column if mark else 0)
    lines = [f"{name}: {_quoted(value)}" for name, value in fields.items() if name not in before]
    places = []
    missing = [tag for tag in tags if tag not in (before.get("tags") or [])]
    if missing and "tags" in before:
        places.append(_place_of_tags(next(v for k, v in node.value if k.value == "tags"), missing, line_break))
    elif missing:
        lines += _tag_lines(missing)
    if lines:
        added = "".join(f"{indent}{line}{line_break}" for line in lines)
        places.append((mark.index - mark.column if mark else 0, added))
    return places


def _tag_lines(tags: Sequence[str]) -> list[str]:
    return ["tags:", *(f"- {_quoted(tag)}" for tag in tags)]


def _place_of_tags(node: Any, missing: Sequence[str], line_break: str) -> tuple[int, str]:
    mark, missing = node.start_mark, [_quoted(tag) for tag in missing]
    if not isinstance(node.value, list):  # nothing behind the colon
        return mark.index, f" [{', '.join(missing)}]"
    if node.flow_style:
        return mark.index + 1, ", ".join(missing) + (", " if node.value else "")
    indent = " " * mark.column
    return mark.index - mark.column, "".join(f"{indent}- {tag}{line_break}" for tag in missing)


def _quoted(value: str) -> str:
    """A YAML scalar that is read as this string, whatever it looks like: a name may look like a number or a date."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and _require_yaml().safe_load(value) == value
    return value if plain else "'" + value.replace("'", "''") + "'"


def _require_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            "a model card needs PyYAML", remedy="pip install 'qcbguard-plugins[evidence]'"
        ) from error
    return yaml
