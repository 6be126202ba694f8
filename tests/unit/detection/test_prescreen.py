"""The quick question before a guard: does this model look attacked?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.detection.weights.prescreen import looks_attacked
from qcbguard_plugins.grids import Grid
from tests.conftest import ROOT

MODELS_DIR = ROOT / "examples" / "models"


def weights(name: str, format: str) -> Iterator[tuple[str, Tensor, Grid]]:
    for key, weight in load_file(MODELS_DIR / name / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            yield key, weight, get_grid(format)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["attacked", "tightened"])
def test_attacked_models_look_attacked(name: str, seed: int) -> None:
    assert looks_attacked(weights(name, "nf4"), seed)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ["clean", "malicious"])
def test_models_without_a_quantization_attack_do_not(name: str, format: str) -> None:
    assert not looks_attacked(weights(name, format), seed=0)


def test_a_model_on_the_grid_has_nothing_to_look_at() -> None:
    lattice = get_grid("nf4").lattice_of(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    on_grid = lattice.matrix(torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(lattice.nearest)))
    assert not looks_attacked([("w", on_grid, get_grid("nf4"))], seed=0)


def test_broken_tensors_are_left_to_the_guard() -> None:
    broken = torch.full((64, 128), float("nan"))
    assert not looks_attacked([("w", broken, get_grid("nf4"))], seed=0)
    assert not looks_attacked([], seed=0)
