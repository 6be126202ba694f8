"""A fast quantizer whose answers the real one checks.

The reimplementation restates ggml's searches. Whether it does so to the last bit depends on ggml's version and on the
machine that both were compiled for. So in every call some rows, chosen at random, are quantized by the real library as
well, and both must agree on every code, scale and offset. At the first difference the library answers for that type,
for the rest of the process. The manifest says which quantizer was asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.backends.ggml.library import GgmlLibrary, load_library
from qcbguard_plugins.grids.ggml import Kernels
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES, BlockType, StoredBlocks

Quantize = Callable[[BlockType, Tensor, Tensor | None], StoredBlocks]

# One row in this many is checked, and at least one of every call.
_ROWS_PER_CHECK = 32


class CheckedQuantizer:
    """ggml's quantizer by its reimplementation, checked by the library.

    Attributes:
        library: The real quantizer.
        differing: Types whose reimplementation was found to differ.
    """

    def __init__(self, library: GgmlLibrary, *, reimplementation: bool = True) -> None:
        self.library = library
        self.differing: set[str] = set()
        self._reimplementation = _load_reimplementation() if reimplementation else None

    def __call__(self, block_type: BlockType, weight: Tensor, importance: Tensor | None = None, /) -> StoredBlocks:
        """What ggml stores for rows of weights."""
        if not self.is_restated(block_type):
            return self._ask(block_type, weight, importance)
        assert self._reimplementation is not None, "a type is restated only where there is a reimplementation"
        stored = self._reimplementation(block_type, weight, importance)
        rows = slice(random.randrange(min(_ROWS_PER_CHECK, len(weight))), None, _ROWS_PER_CHECK)  # noqa: S311
        if _same(_rows_of(stored, len(weight), rows), self._ask(block_type, weight[rows], importance)):
            return stored
        self.differing.add(block_type.name)
        return self._ask(block_type, weight, importance)

    def is_restated(self, block_type: BlockType) -> bool:
        """True while the reimplementation answers for a type."""
        return self._reimplementation is not None and block_type.name not in self.differing

    def real(self) -> CheckedQuantizer:
        """The library alone."""
        return CheckedQuantizer(self.library, reimplementation=False)

    def describe(self) -> str:
        """Who was asked, for the record."""
        if self._reimplementation is None:
            return "none: numba is not installed"
        import numba

        text = f"numba {numba.__version__}, 1 row in {_ROWS_PER_CHECK} compared with ggml"
        return text + f"; not used, because it differs: {', '.join(sorted(self.differing))}" * bool(self.differing)

    def _ask(self, block_type: BlockType, weight: Tensor, importance: Tensor | None) -> StoredBlocks:
        return block_type.read(self.library.quantize(block_type, weight, importance))


@lru_cache(maxsize=8)
def checked_quantizer(library_path: Path | None = None, *, reimplementation: bool = True) -> CheckedQuantizer:
    """The quantizer of a library, one for the whole process.

    Args:
        library_path: A ggml library; ``None`` for that of an installed package.
        reimplementation: False to ask the library alone.

    Raises:
        UsageError, MissingDependencyError: As :func:`~qcbguard_plugins.backends.ggml.library.load_library`.
    """
    return CheckedQuantizer(load_library(library_path), reimplementation=reimplementation)


def _load_reimplementation() -> Quantize | None:
    try:
        from qcbguard_plugins._kernels.ggml.quantizer import quantize
    except ImportError:
        return None
    return quantize


@lru_cache(maxsize=1)
def load_kernels() -> Kernels | None:
    """The compiled forms of what the grids and the search do in torch; ``None`` without numba."""
    try:
        from qcbguard_plugins._kernels.ggml.kernels import NumbaKernels
    except ImportError:
        return None
    return NumbaKernels()


def _rows_of(stored: StoredBlocks, num_rows: int, rows: slice) -> StoredBlocks:
    def part(tensor: Tensor) -> Tensor:
        return tensor.view(num_rows, -1)[rows].reshape(-1, tensor.shape[1])

    return StoredBlocks(part(stored.codes), part(stored.scale), part(stored.offset))


def _same(first: StoredBlocks, second: StoredBlocks) -> bool:
    """Equal in everything that can show in a stored value; 0 and -0 are one."""
    return all(
        torch.equal(mine, real)
        for mine, real in (
            (first.codes, second.codes),
            (first.scale, second.scale),
            (first.offset, second.offset),
        )
    )


def library_facts(type_names: Iterable[str], library_path: Path | None, *, has_imatrix: bool) -> dict[str, str]:
    """The ggml library that was asked, for the record; none where formulas were enough."""
    if not any(BLOCK_TYPES[name].searched for name in type_names) and not has_imatrix:
        return {}
    quantizer = checked_quantizer(library_path)
    return {"ggml": quantizer.library.version, "ggml_reimplementation": quantizer.describe()}
