"""What every defense of single weights must do on every grid; a new one of either is picked up by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins._util.random import philox_key
from qcbguard_plugins.backends.formats import all_formats, backend_of
from qcbguard_plugins.defenses import ChoiceContext, WholeModelDefense, available_defenses, get_defense, rng_for
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.rounding.guard_weight import guard_weight

# Methods that learn from a whole model have a contract of their own.
METHODS = sorted(name for name, cls in available_defenses().items() if not issubclass(cls, WholeModelDefense))
# Every type fits it.
NUM_COLUMNS = 256

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("name", sorted(all_formats())),
]


def grid_of(name: str) -> Grid:
    return backend_of(name).representative_grid(name)


def weight_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(24, NUM_COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


def hessian() -> Tensor:
    rows = torch.randn(2 * NUM_COLUMNS, NUM_COLUMNS, generator=torch.Generator().manual_seed(1))
    return rows.T @ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_stored_as_planned(method: str, name: str, dtype: torch.dtype) -> None:
    weight, grid = weight_of(dtype), grid_of(name)
    guarded = guard_weight(weight, grid.probe(), get_defense(method), seed=0, name="w", hessian=hessian())
    assert backend_of(name).stored_digest(guarded.weight, grid) == guarded.digest
    assert torch.equal(backend_of(name).stored_codes(guarded.weight, grid), guarded.codes)
    assert 0 < guarded.num_moved < weight.numel()
    assert guarded.weight.dtype == dtype and torch.isfinite(guarded.weight).all()


def test_chooses_one_code_a_weight(method: str, name: str) -> None:
    lattice = grid_of(name).lattice_of(weight_of())
    codes = get_defense(method).choose(lattice, ChoiceContext(rng_for(0, "w"), hessian(), key=philox_key(0, "w")))
    assert codes.shape == lattice.blocks.shape
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < lattice.grid.num_levels
    if not get_defense(method).needs_calibration:
        assert ((codes == lattice.lower) | (codes == lattice.lower + 1)).all()


def test_is_deterministic_under_its_seed(method: str, name: str) -> None:
    def run(seed: int, tensor: str = "w") -> Tensor:
        grid, defense = grid_of(name).probe(), get_defense(method)
        return guard_weight(weight_of(), grid, defense, seed=seed, name=tensor, hessian=hessian()).weight

    assert torch.equal(run(1), run(1))
    is_random = get_defense(method).is_random
    assert torch.equal(run(1), run(2)) != is_random
    assert torch.equal(run(1), run(1, "another")) != is_random
