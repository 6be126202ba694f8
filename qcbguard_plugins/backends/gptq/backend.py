"""GPTQ as a backend: integer groups, quantized by GPTQModel, directly or through transformers and Optimum."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcbguard_plugins.backends.base import Backend, Selection, StoredCodes
from qcbguard_plugins.backends.gptq.artifact import PackedFolder, is_gptq_folder
from qcbguard_plugins.backends.gptq.stock import affine_grid, require_gptq
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.layers import block_layers, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gptq(Backend):
    """2 to 8 bits in groups of columns. It takes the linear layers of the decoder blocks."""

    name = "gptq"
    extra = "gptq"
    packages = ("gptqmodel", "optimum")
    formats = {  # noqa: RUF012
        "gptq-w4g128": "GPTQ integer groups: 2 to 8 bits, g32, g64, g128 or whole rows, -asym",
    }

    def takes(self, format: str) -> bool:
        return format.startswith("gptq-")

    def require(self) -> Any:
        return require_gptq()

    def grid(self, format: str) -> Grid:
        return affine_grid(format)

    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        grid = self.grid(format)
        layers = block_layers(skeleton)
        found = [target_of(skeleton, name, grid, transposed=transposed) for name, transposed in layers.items()]
        return Selection({target.name: target for target in found})

    def open_artifact(self, path: Path) -> StoredCodes | None:
        return PackedFolder(path) if is_gptq_folder(path) else None
