"""The table of backends, and what a format's name says: which of them it belongs to, and its grid."""

from __future__ import annotations

from collections.abc import Iterable

from qcbguard_plugins._util.records import installed_versions
from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.backends.bitsandbytes.backend import BitsAndBytes
from qcbguard_plugins.backends.ggml.backend import Ggml
from qcbguard_plugins.backends.gptq.backend import Gptq
from qcbguard_plugins.backends.integer import WEIGHT_ONLY
from qcbguard_plugins.backends.onnx.backend import Onnx
from qcbguard_plugins.backends.openvino.backend import OpenVino
from qcbguard_plugins.backends.torchao.backend import TorchAo
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import Grid

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (BitsAndBytes(), Ggml(), Gptq(), TorchAo(), Onnx(), OpenVino(), *WEIGHT_ONLY)
}


def all_formats() -> dict[str, str]:
    """Formats as users spell them, each with one line that says what it is."""
    return {name: summary for backend in BACKENDS.values() for name, summary in backend.formats.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of all packages that a result may depend on."""
    return installed_versions([package for backend in BACKENDS.values() for package in backend.packages])


def backend_of(format: str, backends: Iterable[Backend] = ()) -> Backend:
    """The backend that a format belongs to.

    Args:
        format: The format.
        backends: Backends with settings of the user's, which come before those of the table.

    Raises:
        UsageError: No backend has formats that are spelled like this.
    """
    for backend in (*backends, *BACKENDS.values()):
        if backend.takes(format):
            return backend
    raise UsageError(f"unknown format {format!r}", remedy=f"Formats: {', '.join(all_formats())}.")


def get_grid(format: str) -> Grid:
    """The grid of a format.

    Args:
        format: ``nf4``, ``fp4``, ``int8``, ``nf4-b128`` and the like for another block size, a GGUF tensor type as in
            ``gguf:Q4_K``, GPTQ groups as in ``gptq-w4g128``, or a toolchain's as in ``openvino:int8``.

    Raises:
        UsageError: The format is unknown, or the block size is not one that the quantizer allows.
        MissingDependencyError: A GGUF type needs the real quantizer, and there is none.
    """
    return backend_of(format).grid(format)


def fitting_grid(grid: Grid, shape: tuple[int, int]) -> Grid | None:
    """The grid for a weight of this shape: where a format does not fit it, the one that the stock tool takes instead.

    Returns:
        ``None`` where no grid fits.
    """
    while grid.fits(shape):
        if not grid.fallback:
            return None
        grid = get_grid(grid.fallback)
    return grid
