"""Parts of reports: strict records, the time, and the versions of what a result depends on."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata

from pydantic import BaseModel, ConfigDict

DISTRIBUTION = "qcbguard-plugins"

_REPORTED_PACKAGES = (
    DISTRIBUTION,
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "bitsandbytes",
    "gguf",
    "xllamacpp",
    "gptqmodel",
    "torchao",
    "optimum",
    "onnxruntime",
    "openvino",
    "peft",
    "nncf",
)


class Record(BaseModel):
    """A part of a report: immutable, and strict about unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def now() -> str:
    """The time, as the reports write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return dict(_installed_versions())


@lru_cache(maxsize=1)
def _installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
