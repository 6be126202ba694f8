"""What every defense of single weights must do on every grid; a new one is picked up by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins._util.random import key_for
from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes
from qcbguard_plugins.backends.formats import FORMATS, get_grid
from qcbguard_plugins.defenses import Evidence, WholeModelDefense, available_defenses, get_defense, rng_for
from qcbguard_plugins.rounding.guard_weight import guard_weight

# Methods that learn from a whole model have a contract of their own.
METHODS = sorted(name for name, cls in available_defenses().items() if not issubclass(cls, WholeModelDefense))

pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("name", sorted(FORMATS)),
]


def weight_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)


def hessian() -> Tensor:
    rows = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    return rows.T @ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lands_as_planned(method: str, name: str, dtype: torch.dtype) -> None:
    weight = weight_of(dtype)
    guarded = guard_weight(weight, get_grid(name), get_defense(method), seed=0, name="w", hessian=hessian())
    assert torch.equal(stock_codes(guarded.weight, name), guarded.codes)
    assert 0 < guarded.num_moved < weight.numel()
    assert guarded.num_moved == int((guarded.codes != get_grid(name).quantize(weight)).sum())


def test_chooses_one_code_a_weight(method: str, name: str) -> None:
    lattice = get_grid(name).lattice_of(weight_of())
    codes = get_defense(method).choose(lattice, Evidence(rng_for(0, "w"), hessian(), key=key_for(0, "w")))
    assert codes.shape == lattice.blocks.shape
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < lattice.grid.num_levels
    if not get_defense(method).needs_calibration:
        assert ((codes == lattice.lower) | (codes == lattice.lower + 1)).all()


def test_is_deterministic_under_its_seed(method: str, name: str) -> None:
    def run(seed: int, tensor: str = "w") -> Tensor:
        grid = get_grid(name)
        return guard_weight(weight_of(), grid, get_defense(method), seed=seed, name=tensor, hessian=hessian()).weight

    assert torch.equal(run(1), run(1))
    draws = method in ("stochastic", "noise", "feedback")
    assert torch.equal(run(1), run(2)) != draws
    assert torch.equal(run(1), run(1, "another")) != draws
