"""How progress is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[int], Any]
