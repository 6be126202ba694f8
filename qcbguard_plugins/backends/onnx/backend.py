"""ONNX Runtime's dynamic quantization as a backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcbguard_plugins.backends.base import Selection, StoredCodes
from qcbguard_plugins.backends.exported import ExportedCodes
from qcbguard_plugins.backends.integer import IntegerBackend
from qcbguard_plugins.backends.onnx.reader import onnx_codes
from qcbguard_plugins.models.layers import exported_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Onnx(IntegerBackend):
    """Dynamic int8 and uint8."""

    name = "onnx"
    extra = "onnx"
    packages = ("optimum", "onnxruntime", "onnx")
    formats = {  # noqa: RUF012
        "onnx:int8": "ONNX Runtime dynamic int8, per channel (avx512_vnni, arm64); -tensor for one scale a tensor",
        "onnx:uint8": "ONNX Runtime dynamic uint8, per channel (avx2, avx512); -tensor for one scale a tensor",
    }

    def require(self) -> Any:
        try:
            import onnxruntime.quantization
        except ImportError as error:
            raise self.missing(error) from error
        return onnxruntime.quantization

    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        # A table gets one scale, and a zero point beside int8 weights.
        table_grid = self.grid("onnx:uint8-tensor" if "uint8" in format else "onnx:uint8-table")
        found = exported_layers(skeleton, self.grid(format), table_grid=table_grid)
        return Selection({target.name: target for target in found})

    def open_artifact(self, path: Path) -> StoredCodes | None:
        return ExportedCodes(self.name, path, onnx_codes) if path.suffix == ".onnx" else None
