"""OpenVINO's weight compression as a backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcbguard_plugins.backends.base import Selection, StoredCodes
from qcbguard_plugins.backends.exported import ExportedCodes
from qcbguard_plugins.backends.integer import IntegerBackend
from qcbguard_plugins.backends.openvino.reader import MODEL_FILE, openvino_codes
from qcbguard_plugins.models.layers import exported_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OpenVino(IntegerBackend):
    """Weights of 8 and 4 bits, compressed by NNCF."""

    name = "openvino"
    extra = "openvino"
    packages = ("optimum", "openvino", "nncf")
    formats = {  # noqa: RUF012
        "openvino:int8": "OpenVINO (NNCF) int8 weights, asymmetric, one scale a row; -sym",
        "openvino:int4-g128": "OpenVINO (NNCF) int4 weights, asymmetric; other groups alike, -sym",
    }

    def require(self) -> Any:
        try:
            import nncf
            import openvino  # noqa: F401
        except ImportError as error:
            raise self.missing(error) from error
        return nncf

    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        # Tables and the head stay at 8 bits, asymmetric, where the rest gets fewer.
        wide = None if format.startswith("openvino:int8") else self.grid("openvino:int8")
        found = exported_layers(skeleton, self.grid(format), table_grid=wide, head_grid=wide)
        return Selection({target.name: target for target in found})

    def open_artifact(self, path: Path) -> StoredCodes | None:
        return ExportedCodes(self.name, path, openvino_codes) if (path / MODEL_FILE).is_file() else None
