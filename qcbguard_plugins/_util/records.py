"""What all reports are made of: strict records, a head, and the versions of what a result depends on."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata

from pydantic import BaseModel, ConfigDict, Field

DISTRIBUTION = "qcbguard-plugins"

_PACKAGES = (DISTRIBUTION, "torch", "numpy", "safetensors", "transformers", "peft")


class Record(BaseModel):
    """A part of a report: immutable, and strict about unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def now() -> str:
    """The time, as the reports write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Report(Record):
    """The head of every report.

    Attributes:
        schema_version: Version of the report's own schema.
        kind: What it is a report of.
        created: When it was made.
        versions: Versions of Python and of the packages that the result depends on.
    """

    schema_version: int
    kind: str
    created: str = Field(default_factory=now)
    versions: dict[str, str]


def installed_versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that every result depends on, and of others where they are installed."""
    return dict(_installed_versions(tuple(dict.fromkeys([*_PACKAGES, *packages]))))


@lru_cache(maxsize=8)
def _installed_versions(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
