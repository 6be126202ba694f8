"""Grids of GGUF types, with the real quantizer behind those that search."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.backends.ggml.checked import checked_quantizer, load_kernels
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.ggml import MIN_AS_PLANNED, FormulaGrid, GgmlGrid, SearchedGrid
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES


def gguf_grid(
    type_name: str,
    *,
    outtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
    library_path: Path | None = None,
    min_as_planned: float = MIN_AS_PLANNED,
) -> GgmlGrid:
    """The grid of a tensor type such as ``Q4_K``.

    Args:
        type_name: ggml's name of the type.
        outtype: Dtype of the GGUF file that ``llama-quantize`` will read.
        importance: float32 ``[in_features]``, the tensor's importance matrix, where the user has one; for a stack of
            matrices ``[num_matrices, in_features]``.
        library_path: A ggml library to ask; ``None`` for that of an installed package.
        min_as_planned: Share of a tensor's codes that must be stored as chosen.

    Raises:
        UsageError: The type is unknown, or is none that can be guarded.
        MissingDependencyError: The type needs the real quantizer and there is none.
    """
    block_type = BLOCK_TYPES.get(type_name)
    if block_type is None:
        raise UsageError(f"gguf:{type_name} is no type that can be guarded", remedy=f"Types: {', '.join(BLOCK_TYPES)}.")
    # Q8_0 looks at no importance matrix.
    if not block_type.searched and (importance is None or type_name == "Q8_0"):
        return FormulaGrid(block_type, outtype, load_kernels(), min_as_planned=min_as_planned)
    quantizer = checked_quantizer(library_path)
    return SearchedGrid(block_type, quantizer, outtype, importance, load_kernels(), min_as_planned=min_as_planned)
