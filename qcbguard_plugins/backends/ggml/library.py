"""The real ggml quantizer, called in place.

Every llama.cpp build exports ``ggml_quantize_chunk``, the function that ``llama-quantize`` calls for each tensor. The
prebuilt wheel ``xllamacpp`` carries it, so does ``llama-cpp-python``, and a user may name the library of a build of his
own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.errors import MissingDependencyError, UsageError
from qcbguard_plugins.grids.ggml_blocks import BlockType

_FLOATS = ctypes.POINTER(ctypes.c_float)
# Rows go to the threads in runs of about this many weights.
_WEIGHTS_PER_CHUNK = 1 << 18
# Packages that carry the library, and where in them.
_PACKAGES = {
    "xllamacpp": ("xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd", "*ggml-base*")),
    "llama_cpp": ("llama-cpp-python", ("lib/libggml-base.so", "lib/libggml-base.dylib", "lib/ggml-base.dll")),
}


@dataclass(frozen=True)
class GgmlLibrary:
    """A loaded ggml.

    Attributes:
        path: The shared library.
        version: Where it comes from and which version it is, for the record.
    """

    path: Path
    version: str
    _handle: ctypes.CDLL

    def quantize(self, block_type: BlockType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Quantize a weight exactly as ``llama-quantize`` does.

        Args:
            block_type: The type.
            weight: float32 ``[num_rows, num_columns]``, columns a multiple of the block size, all finite.
            importance: float32 ``[num_columns]``, the importance matrix of the tensor.

        Returns:
            uint8 ``[num_rows, row_bytes]``.
        """
        rows = weight.detach().cpu().contiguous().numpy()
        num_rows, num_columns = rows.shape
        if num_columns % block_type.block_size:
            # The library would write past the end of the buffer.
            raise UsageError(
                f"{block_type.name} takes rows of a multiple of {block_type.block_size}, not {num_columns}"
            )
        packed = np.empty((num_rows, block_type.row_bytes(num_columns)), np.uint8)
        columns = None if importance is None else np.ascontiguousarray(importance.cpu().numpy(), np.float32)
        self._handle.ggml_quantize_init(block_type.number)

        def quantize_rows(start: int) -> int:
            stop = min(start + step, num_rows)
            written: int = self._handle.ggml_quantize_chunk(
                block_type.number,
                rows[start:stop].ctypes.data_as(_FLOATS),
                packed[start:stop].ctypes.data,
                0,
                stop - start,
                num_columns,
                None if columns is None else columns.ctypes.data_as(_FLOATS),
            )
            return written

        step = max(1, _WEIGHTS_PER_CHUNK // num_columns)
        written = sum(map_over_threads(quantize_rows, range(0, num_rows, step)))
        if written != packed.nbytes:
            raise MissingDependencyError(
                f"{self.path.name} wrote {written} bytes of {block_type.name} where {packed.nbytes} were due",
                remedy="Name another library with --ggml-library.",
            )
        return torch.from_numpy(packed)


@lru_cache(maxsize=8)
def load_library(path: Path | None = None) -> GgmlLibrary:
    """Load ggml from a path, or from an installed package.

    Raises:
        UsageError: The path does not name a library with ggml's quantizers.
        MissingDependencyError: No path was given and no package with ggml is installed.
    """
    if path is not None:
        handle = _open(path)
        if handle is None:
            raise UsageError(
                f"{path} is not a shared library with ggml_quantize_chunk",
                remedy="Name the libggml-base of a llama.cpp build.",
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return GgmlLibrary(path, f"{path.name} sha256:{digest}{_ggml_version(handle)}", handle)
    for candidate, version in _installed():
        handle = _open(candidate)
        if handle is not None:
            return GgmlLibrary(candidate, version + _ggml_version(handle), handle)
    raise MissingDependencyError(
        "no ggml library was found, so the K-quants and IQ types cannot be guarded",
        remedy="pip install 'qcbguard-plugins[gguf]', or name the libggml-base of a llama.cpp build with "
        "--ggml-library. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 need no library.",
    )


def _installed() -> Iterator[tuple[Path, str]]:
    for package, (distribution, patterns) in _PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        for folder in spec.submodule_search_locations:
            for pattern in patterns:
                for file in sorted(Path(folder).glob(pattern)):
                    yield file, f"{distribution} {metadata.version(distribution)}"


def _ggml_version(handle: ctypes.CDLL) -> str:
    """What the library calls itself; not every build says so."""
    try:
        handle.ggml_version.restype = ctypes.c_char_p
        version = handle.ggml_version()
    except AttributeError:
        return ""
    return f", ggml {version.decode()}" if version else ""


def _open(path: Path) -> ctypes.CDLL | None:
    """The library with its functions declared, or ``None`` where it has none of ggml's."""
    try:
        handle = ctypes.CDLL(str(path))
        handle.ggml_quantize_chunk.restype = ctypes.c_size_t
        handle.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            _FLOATS,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            _FLOATS,
        ]
        handle.ggml_quantize_init.argtypes = [ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return handle
