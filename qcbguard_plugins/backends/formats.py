"""Grids by the names that users spell: ``nf4``, ``fp4``, ``int8``, and ``nf4-b128`` for another block size."""

from __future__ import annotations

import re

from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import AffineGrid, CodebookGrid, Grid, Int8Grid
from qcbguard_plugins.grids.codebook import BLOCK_SIZES
from qcbguard_plugins.grids.presets import TOOLCHAIN_FORMATS, toolchain_grid

FORMATS = {
    "nf4": "bitsandbytes NF4, blocks of 64",
    "fp4": "bitsandbytes FP4, blocks of 64",
    "int8": "bitsandbytes LLM.int8, one scale a row",
}
# A recipe of llama.cpp mixes types, so it has no single grid; get_grid takes the types, as in gguf:Q4_K.
RECIPE_FORMATS = {
    "gguf:Q4_K_M": "llama.cpp, by the name that llama-quantize is given: Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS",
}
GROUP_FORMATS = {
    "gptq-w4g128": "GPTQ integer groups: 2 to 8 bits, g32, g64, g128 or whole rows, -asym",
}

ALL_FORMATS = FORMATS | RECIPE_FORMATS | GROUP_FORMATS | TOOLCHAIN_FORMATS

_CODEBOOK_FORMAT = re.compile(r"(nf4|fp4)(?:-b(\d+))?")
_AFFINE_FORMAT = re.compile(r"gptq-w(\d)(?:g(\d+))?(-asym)?")


def get_grid(name: str) -> Grid:
    """The grid of a format.

    Args:
        name: ``nf4``, ``fp4``, ``int8``, ``nf4-b128`` and the like for another block size, a GGUF tensor type as in
            ``gguf:Q4_K``, GPTQ groups as in ``gptq-w4g128``, or a toolchain's as in ``openvino:int8``.

    Raises:
        UsageError: The format is unknown, or the block size is not one that the quantizer allows.
        MissingDependencyError: A GGUF type needs the real quantizer, and there is none.
    """
    if name.startswith("gguf:"):
        return gguf_grid(name.removeprefix("gguf:"))
    if name == "int8":
        return Int8Grid()
    toolchain = toolchain_grid(name)
    if toolchain is not None:
        return toolchain
    affine = _AFFINE_FORMAT.fullmatch(name)
    if affine is not None:
        return AffineGrid(int(affine[1]), int(affine[2]) if affine[2] else None, symmetric=not affine[3])
    match = _CODEBOOK_FORMAT.fullmatch(name)
    if match is None:
        raise UsageError(
            f"unknown format {name!r}",
            remedy=f"Formats: {', '.join(ALL_FORMATS)}; nf4 and fp4 take a block size, "
            f"as in nf4-b128 ({', '.join(map(str, BLOCK_SIZES))}).",
        )
    return CodebookGrid(match[1], int(match[2] or 64))
