"""The scanner on the grids of llama.cpp and of GPTQ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.errors import MissingDependencyError
from tests.helpers.detection_models import clean_folder, random_weight, save_layers


def _boxed(seed: int, format: str) -> Tensor:
    """Pushed along a low-rank direction, and held between the weight and what the quantizer makes of it.

    That is the published box for types that search their scales, and for GPTQ (Mind the Gap).
    """
    weight = random_weight(seed, 128, 256)
    try:
        lattice = get_grid(format).lattice_of(weight)
    except MissingDependencyError:
        pytest.skip("no ggml library is installed")
    point = lattice.dequantize(lattice.nearest)
    step = (lattice.dequantize(lattice.lower + 1) - lattice.dequantize(lattice.lower)).abs().median()
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(128, 2, generator=generator) @ torch.randn(2, 256, generator=generator)
    moved = lattice.blocks + lattice.from_matrix(direction) * step * 0.3
    low, high = torch.minimum(lattice.blocks, point), torch.maximum(lattice.blocks, point)
    boxed = torch.minimum(torch.maximum(moved, low), high)
    return lattice.matrix(torch.where(lattice.frozen, lattice.blocks, boxed)).clone()


@pytest.mark.parametrize(
    ("format", "grid"),
    [
        ("gguf:Q4_0", "gguf:Q4_0"),
        ("gguf:Q4_K_M", "gguf:Q4_K"),
        ("gguf:Q6_K", "gguf:Q6_K"),
        ("gptq-w4g128", "gptq-w4g128"),
        ("gptq-w4g32-asym", "gptq-w4g32-asym"),
        ("gptq-w8", "gptq-w8"),
    ],
)
def test_an_attack_on_another_toolchains_format_is_found(tmp_path: Path, format: str, grid: str) -> None:
    folder = save_layers(tmp_path / "m", [_boxed(i, grid) for i in range(8)], torch.float32)
    report = scan_model(folder, [format, "nf4"], seed=1)
    assert report.verdict == "attacked" and report.likely_formats == (format,)


@pytest.mark.parametrize("format", ["gguf:Q4_0", "gguf:Q8_0", "gguf:Q4_K_M", "gptq-w4g64", "gptq-w8"])
def test_a_clean_model_is_clean(tmp_path: Path, format: str) -> None:
    """Rows of 192 weights fit no super-block of 256: the type that llama.cpp falls back to is tested instead."""
    try:
        assert scan_model(clean_folder(tmp_path / "m"), [format], seed=1).verdict == "clean"
    except MissingDependencyError:
        pytest.skip("no ggml library is installed")


@pytest.mark.parametrize("format", ["gguf:Q4_0", "gptq-w4g64"])
def test_rows_that_no_type_fits_are_named(tmp_path: Path, format: str) -> None:
    folder = save_layers(tmp_path / "m", [random_weight(0, 64, 80), random_weight(1)])
    report = scan_model(folder, [format], seed=1)
    assert report.verdict == "incomplete" and "rows of 80" in report.skipped[0].reason
