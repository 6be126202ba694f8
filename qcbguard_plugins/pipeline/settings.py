"""What the user asks for: a method, its seed, its calibration."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcbguard_plugins.defenses import Defense, Feedback, get_defense
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.models.calibration import Calibration


@dataclass(frozen=True)
class Guard:
    """How to guard.

    Plain data: it can be copied, compared and described as JSON.

    Attributes:
        method: The defense with its parameters.
        seed: Seed of the random draws. ``None`` takes a fresh one from the operating system and records it: an attacker
            who knows the seed could prepare for it.
        calibration: Where calibration text comes from, for a method that needs it.
        cache_dir: Where calibrated weights are kept between loads; ``None`` is the user's cache directory.
    """

    method: Defense = field(default_factory=Feedback)
    seed: int | None = None
    calibration: Calibration = field(default_factory=Calibration)
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Defense):
            raise UsageError(f"the method of a guard is a defense such as Feedback(), got {self.method!r}")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0):
            raise UsageError(f"seed must be a whole number of at least 0, got {self.seed!r}")

    def with_seed(self) -> Guard:
        """The same guard with its seed drawn."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))

    def with_source(self, has_tokenizer: bool) -> Guard:
        """The same guard with its calibration text decided on, for the report to name it.

        Raises:
            CalibrationError: The source needs a tokenizer and there is none.
        """
        source = self.calibration.resolve(has_tokenizer)
        return replace(self, calibration=replace(self.calibration, source=source))

    def describe(self) -> dict[str, Any]:
        """The guard as JSON values."""
        return {
            "method": self.method.name,
            "parameters": self.method.parameters(),
            "seed": self.seed,
            "calibration": self.calibration.describe() if self.method.needs_calibration else None,
        }


def as_guard(guard: Guard | Defense | str) -> Guard:
    """Accept a guard, a defense, or a method's name.

    Raises:
        UsageError: It is none of these, or the name is unknown.
    """
    if isinstance(guard, Guard):
        return guard
    if isinstance(guard, Defense):
        return Guard(guard)
    if isinstance(guard, str):
        return Guard(get_defense(guard))
    raise UsageError(f"guard= takes a method's name, a defense or a Guard, got {type(guard).__name__}")
