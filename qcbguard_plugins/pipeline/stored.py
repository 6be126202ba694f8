"""What the stock quantizers of a plan store for a weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint.manifest import combined_digest
from qcbguard_plugins.grids import Grid, IntegerGrid
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.rounding.digests import blocks_digest, codes_digest


def grid_digest(weight: Tensor, grid: Grid) -> str:
    """The digest of what the stock quantizer stores for a weight."""
    if isinstance(grid, GgmlGrid):
        return blocks_digest(grid.stored(weight), grid.block_type, weight.shape[0])
    if isinstance(grid, IntegerGrid):
        return codes_digest(grid.quantize(weight))
    from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes

    return codes_digest(stock_codes(weight, grid.name))


def stock_digest(weight: Tensor, format: str, toolchain: Mapping[str, str]) -> str:
    """The digest of what the stock quantizers of a manifest's entry store for a weight.

    Args:
        weight: ``[out_features, in_features]`` in the dtype that they read.
        format: Formats with commas, GGUF ones by type.
        toolchain: The manifest's facts about llama.cpp.
    """
    digests = {name: grid_digest(weight, _grid(name, toolchain)) for name in format.split(",")}
    return next(iter(digests.values())) if len(digests) == 1 else combined_digest(digests)


def _grid(name: str, toolchain: Mapping[str, str]) -> Grid:
    if not name.startswith("gguf:"):
        return get_grid(name)
    from qcbguard_plugins.backends.ggml.folder import checked_manifest_outtype
    from qcbguard_plugins.backends.ggml.grids import gguf_grid

    # Whether a plan is kept is a question for the library alone.
    return gguf_grid(name.removeprefix("gguf:"), outtype=checked_manifest_outtype(dict(toolchain)), twin=False)
