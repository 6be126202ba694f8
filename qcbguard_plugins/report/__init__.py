"""What a run found out: first the model, then the renderings."""

from __future__ import annotations

from qcbguard_plugins.report.model import (
    MANIFEST_FILE,
    FileRecord,
    GuardReport,
    TensorRecord,
    TensorVerdict,
    VerifyReport,
    installed_versions,
    read_manifest,
)

__all__ = [
    "MANIFEST_FILE",
    "FileRecord",
    "GuardReport",
    "TensorRecord",
    "TensorVerdict",
    "VerifyReport",
    "installed_versions",
    "read_manifest",
]
