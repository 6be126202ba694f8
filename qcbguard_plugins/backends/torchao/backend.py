"""torchao as a backend."""

from __future__ import annotations

from typing import Any

from qcbguard_plugins.backends.integer import IntegerBackend
from qcbguard_plugins.backends.torchao.stock import require_torchao


class TorchAo(IntegerBackend):
    """Weight-only integers of torchao."""

    name = "torchao"
    extra = "torchao"
    packages = ("torchao",)
    formats = {  # noqa: RUF012
        "torchao:int8": "torchao Int8WeightOnlyConfig, one scale a row",
        "torchao:int4-g128": "torchao IntxWeightOnlyConfig(torch.int4, PerGroup(128)); other groups alike",
    }

    def require(self) -> Any:
        return require_torchao()
