"""The claim that a saved model carries: what was done to it."""

from __future__ import annotations

from typing import Any

from qcbguard_plugins.checkpoint.manifest import GuardReport

PROVENANCE_KEY = "qcbguard"

#: The metadata entry of a GGUF file that carries the report; llama-quantize copies it along.
GGUF_PROVENANCE_KEY = "qcbguard.provenance"


def provenance(report: GuardReport) -> dict[str, Any]:
    """What was done to a model, and a hash over the planned codes of all its tensors."""
    return {
        "version": report.versions.get("qcbguard-plugins"),
        "formats": list(report.formats),
        "method": report.method,
        "parameters": report.parameters,
        "seed": report.seed,
        "calibration": report.calibration,
        "chosen": report.chosen,
        "num_tensors": len(report.tensors),
        "codes_sha256": report.codes_sha256,
    }
