"""bitsandbytes as a backend."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qcbguard_plugins.backends.base import Backend, Selection
from qcbguard_plugins.backends.bitsandbytes import stock
from qcbguard_plugins.backends.bitsandbytes.checked import checked_codes
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import CodebookGrid, Grid, Int8Grid
from qcbguard_plugins.models.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = re.compile(r"(nf4|fp4)(?:-b(\d+))?|int8")


class BitsAndBytes(Backend):
    """4-bit codebooks and LLM.int8."""

    name = "bitsandbytes"
    extra = "bnb"
    packages = ("bitsandbytes",)
    on_cuda = True
    formats = {  # noqa: RUF012
        "nf4": "bitsandbytes NF4, blocks of 64; nf4-b128 and the like for others",
        "fp4": "bitsandbytes FP4, blocks of 64; fp4-b128 and the like for others",
        "int8": "bitsandbytes LLM.int8, one scale a row",
    }

    def takes(self, format: str) -> bool:
        return _FORMAT.fullmatch(format) is not None

    def require(self) -> Any:
        return stock.require_bitsandbytes()

    def grid(self, format: str) -> Grid:
        match = _FORMAT.fullmatch(format)
        if match is None:
            raise UsageError(f"bitsandbytes has no format {format!r}", remedy="Use nf4, fp4 or int8.")
        return CodebookGrid(match[1], int(match[2] or 64)) if match[1] else Int8Grid()

    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        grid, dtype = self.grid(format), skeleton.dtype
        targets = [
            Target(f"{name}.weight", (module.out_features, module.in_features), dtype, (grid,), transposed)
            for name, (module, transposed) in stock.quantized_layers(skeleton, stock.config_for(grid)).items()
        ]
        return Selection({target.name: target for target in targets})

    def stored_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        return stock.stock_codes(weight, grid)

    def quick_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        return checked_codes()(weight, grid)

    def facts(self, targets: Sequence[Target]) -> dict[str, str]:
        return {"bitsandbytes_reimplementation": checked_codes().describe()}

    def notes(self) -> dict[str, str]:
        if not stock.repacks_on_this_processor():
            return {}
        return {
            "4-bit on this CPU": "AVX512-BF16: bitsandbytes repacks 4-bit weights at the first forward pass; read "
            "codes, and save stock models, before it"
        }
