"""Patterns of tensors that the user leaves out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcbguard_plugins.errors import UsageError

if TYPE_CHECKING:
    pass


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The target names that the user's patterns match.

    Raises:
        UsageError: A pattern is malformed or matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        try:
            regex = re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
        except re.error as error:
            raise UsageError(f"--ignore {pattern!r} is not a regular expression: {error}") from error
        found = {name for name in names if regex.match(name) or regex.match(name.removesuffix(".weight"))}
        if not found:
            raise UsageError(
                f"--ignore {pattern!r} matches none of {len(names)} target tensors",
                remedy=f"A target's name: {names[0]}",
            )
        matched |= found
    return matched
