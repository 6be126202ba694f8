"""Quantizers that round the linear layers to nearest on a grid of integers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcbguard_plugins.backends.base import Backend, Selection
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.grids.presets import preset_grid
from qcbguard_plugins.models.layers import linear_layers, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class IntegerBackend(Backend):
    """A quantizer whose formats are spelled ``NAME:...`` and which takes every linear layer except the output head."""

    def takes(self, format: str) -> bool:
        return format.startswith(f"{self.name}:")

    def grid(self, format: str) -> Grid:
        grid = preset_grid(format)
        if grid is None:
            raise UsageError(f"unknown format {format!r}", remedy=f"Formats: {', '.join(self.formats)}.")
        return grid

    def targets(self, skeleton: PreTrainedModel, format: str) -> Selection:
        grid = self.grid(format)
        found = [target_of(skeleton, name, grid) for name in linear_layers(skeleton)]
        return Selection({target.name: target for target in found})


class WeightOnlyBackend(IntegerBackend):
    """A library that is used by itself, behind a guarded folder."""

    extra = ""

    def __init__(self, name: str, module: str, packages: tuple[str, ...], formats: Mapping[str, str]) -> None:
        """Describe a library.

        Args:
            name: Its name, which its formats start with.
            module: The module that it is imported by.
            packages: Its distribution.
            formats: Its formats.
        """
        self.name, self.packages, self.formats = name, packages, formats  # type: ignore[misc]
        self._module = module

    def require(self) -> Any:
        try:
            return import_module(self._module)
        except ImportError as error:
            raise self.missing(error) from error


WEIGHT_ONLY = (
    WeightOnlyBackend(
        "compressed-tensors",
        "compressed_tensors",
        ("llmcompressor", "compressed-tensors"),
        {
            "compressed-tensors:int4-g128": "llm-compressor W4A16 by rounding to nearest; other groups alike, -asym",
        },
    ),
    WeightOnlyBackend(
        "quanto",
        "optimum.quanto",
        ("optimum-quanto",),
        {
            "quanto:int8": "Optimum Quanto int8 weights, one scale a row",
            "quanto:int4-g128": "Optimum Quanto int4 weights, with a shift",
        },
    ),
    WeightOnlyBackend("hqq", "hqq", ("hqq",), {"hqq:int4-g64": "HQQ 4-bit, axis=1; other groups alike"}),
    WeightOnlyBackend(
        "autoround",
        "auto_round",
        ("auto-round",),
        {"autoround:int4-g128": "AutoRound W4A16 without tuning (iters=0), symmetric; other groups alike"},
    ),
)
