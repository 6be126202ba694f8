from __future__ import annotations

import pytest
import torch

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.detection.weights.null_grids import (
    draw_inflations,
    generator_for,
    reproduces,
    roundings,
    sample_rows,
)
from qcbguard_plugins.lab.attacks.straight_through import quantize
from tests.helpers.detection_models import random_weight

FORMATS = ("nf4", "fp4", "int8", "nf4-b128")


@pytest.mark.parametrize("format", FORMATS)
def test_the_first_rounding_is_the_stock_quantizers_own(format: str) -> None:
    weight, grid = random_weight(0), get_grid(format)
    exact = next(roundings(weight, grid, [0.2]))
    lattice = grid.lattice_of(weight)
    expected = lattice.matrix(lattice.dequantize(lattice.from_matrix(grid.quantize(weight)))) - grid.read(weight)
    expected[lattice.matrix(lattice.frozen)] = 0
    torch.testing.assert_close(exact.error, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_neighbours_cells_are_wider_by_its_inflation(format: str) -> None:
    exact, near, far = roundings(random_weight(1), get_grid(format), [0.1, 0.4])
    energies = [float(r.error.square().mean()) for r in (exact, near, far)]
    assert energies[0] < energies[1] < energies[2]
    if format == "int8":  # equal steps: the energy goes with the square of the step
        assert energies[2] / energies[0] == pytest.approx(1.4**2, rel=0.1)


def test_inflations_rise_and_differ_between_seeds() -> None:
    one, other = (draw_inflations(generator_for(seed, "x")) for seed in (1, 2))
    assert one == sorted(one) and one != other
    assert one[0] >= 0.1 and one[-1] <= 0.45


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_a_dequantized_weight_is_reproduced_and_a_fresh_one_is_not(format: str) -> None:
    grid, weight = get_grid(format), random_weight(2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert reproduces(quantize(weight, grid).to(dtype), grid) > 0.75
        assert reproduces(weight.to(dtype), grid) < 0.5


@pytest.mark.parametrize(
    ("shape", "format"), [((64, 192), "nf4"), ((96, 48), "nf4"), ((64, 80), "int8"), ((50, 64), "fp4")]
)
def test_sampled_rows_keep_their_scales(shape: tuple[int, int], format: str) -> None:
    grid = get_grid(format)
    weight = random_weight(3, *shape)
    part = sample_rows(weight, grid, weight.numel() // 3, generator_for(0, "rows"))
    assert 0 < part.numel() <= weight.numel() // 3
    lattice, own = grid.lattice_of(weight), grid.lattice_of(part)
    whole_scales = {round(s, 7) for s in lattice.matrix(lattice.scale).flatten().tolist()}
    assert {round(s, 7) for s in own.matrix(own.scale).flatten().tolist()} <= whole_scales


def test_a_small_tensor_is_not_sampled() -> None:
    weight = random_weight(4)
    assert sample_rows(weight, get_grid("nf4"), weight.numel(), generator_for(0, "rows")) is weight
