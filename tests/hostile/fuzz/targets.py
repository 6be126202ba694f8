"""All targets by name."""

from __future__ import annotations

from tests.hostile.fuzz import folder_targets, gguf_targets, text_targets, toolchain_targets  # they register themselves
from tests.hostile.fuzz.registry import TARGETS

__all__ = ["TARGETS", "folder_targets", "gguf_targets", "text_targets", "toolchain_targets"]
