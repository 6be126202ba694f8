"""What every grid that ``qcbguard list`` names must do; a new one is picked up by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import all_formats, backend_of, fitting_grid
from qcbguard_plugins.grids import Grid, cut_blocks

FORMATS = sorted(all_formats())
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = (16, 256)

pytestmark = pytest.mark.parametrize("name", FORMATS)


def grid_of(name: str) -> Grid:
    return backend_of(name).representative_grid(name)


def weight_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def test_levels_are_sorted_and_told_apart_by_a_byte(name: str) -> None:
    levels = grid_of(name).levels
    assert levels.dtype == torch.float32 and 2 <= levels.numel() <= 256
    assert (levels.diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_is_what_the_quantizer_stores(name: str, dtype: torch.dtype) -> None:
    grid, weight = grid_of(name), weight_of(dtype)
    lattice = grid.lattice_of(weight)
    assert torch.equal(lattice.matrix(lattice.nearest), grid.quantize(weight))
    assert torch.equal(grid.quantize(weight), backend_of(name).stored_codes(weight, grid))


def test_neighbours_enclose_the_weight(name: str) -> None:
    lattice = grid_of(name).lattice_of(weight_of())
    assert lattice.position.ge(0).all() and lattice.position.le(1).all()
    low, high = lattice.dequantize(lattice.lower), lattice.dequantize(lattice.lower + 1)
    slack = 1e-5 * lattice.blocks.abs().amax(dim=1, keepdim=True)
    inside = (
        (lattice.coordinate > lattice.grid.coordinate_table.lowest)
        & (lattice.coordinate < lattice.grid.num_levels - 1)
        & ~lattice.frozen
    )
    below, above = torch.minimum(low, high), torch.maximum(low, high)
    assert ((lattice.blocks >= below - slack) & (lattice.blocks <= above + slack))[inside].all()


def test_matrix_and_blocks_are_inverse(name: str) -> None:
    lattice = grid_of(name).lattice_of(weight_of())
    matrix = lattice.matrix(lattice.nearest)
    assert matrix.shape == SHAPE
    assert torch.equal(lattice.from_matrix(matrix), lattice.nearest)


def test_every_code_has_a_weight_that_is_rounded_to_it(name: str) -> None:
    """``weights_for`` gives the weights that a plan needs: the chosen codes come back where no scale is held."""
    grid, weight = grid_of(name), weight_of()
    if grid.searched:
        pytest.skip("a searched scale moves with its weights; the contract of the defenses covers these types")
    lattice = grid.planned_lattice_of(weight)
    codes = torch.where(lattice.frozen, lattice.nearest, lattice.lower + 1)
    values = torch.where(lattice.frozen, lattice.blocks, lattice.weights_for(codes))
    again = grid.lattice_of(lattice.matrix(values))
    free = ~lattice.frozen
    assert torch.equal(again.nearest[free], codes[free])


def test_stored_values_are_the_nearest_levels(name: str) -> None:
    grid, weight = grid_of(name), weight_of()
    values = grid.stored_values(weight)
    assert values.shape == weight.shape and values.dtype == torch.float32
    lattice = grid.lattice_of(weight)
    torch.testing.assert_close(values, lattice.matrix(lattice.dequantize(lattice.nearest)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [256, 128, 96, 32, 20, 7, 1])
def test_fits_says_whether_blocks_can_be_cut(name: str, columns: int) -> None:
    grid = grid_of(name)
    shape = (8, columns)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(columns)) * 0.05
    if grid.fits(shape):
        assert str(columns) in grid.fits(shape)
        fallback = fitting_grid(grid, shape)
        assert fallback is None or not fallback.fits(shape)
    else:
        assert grid.lattice_of(weight).blocks.numel() >= weight.numel()


def test_a_segment_has_the_codes_that_it_has_in_the_whole(name: str) -> None:
    grid, weight = grid_of(name), weight_of()
    if not grid.in_segments:
        pytest.skip("its blocks do not stand alone")
    whole = grid.quantize(weight)
    half = weight[: SHAPE[0] // 2].reshape(-1)
    assert torch.equal(grid.quantize(grid.matrix_of(half, SHAPE[1])).view(-1), whole[: SHAPE[0] // 2].reshape(-1))
    assert cut_blocks(half, grid.block_size_of(SHAPE)).numel() == half.numel()


def test_its_name_leads_back_to_it(name: str) -> None:
    grid = grid_of(name)
    assert backend_of(grid.name).grid(grid.name).name == grid.name
