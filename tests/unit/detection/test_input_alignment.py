"""The input test's statistic: what it is for random errors, and what a planted direction does to it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.detection.inputs.alignment import alignment
from qcbguard_plugins.detection.inputs.combination import combine_directions
from qcbguard_plugins.detection.inputs.rounding_errors import rounding_errors
from qcbguard_plugins.detection.weights.null_grids import draw_inflations, generator_for
from qcbguard_plugins.grids import Grid

NUM_LAYERS, ROWS, COLUMNS = 6, 64, 128


def result_of(weights: list[torch.Tensor], directions: torch.Tensor, grid: Grid, seed: int = 0):
    """The test of some layers, two of each block."""
    inflations = draw_inflations(generator_for(seed, "x"), 6)
    measured = [[alignment(e, directions) for e in rounding_errors(w, grid, inflations)] for w in weights]
    ratios = torch.stack([torch.stack([a.ratio for a in layer]) for layer in measured])
    variances = torch.stack([layer[0].relative_variance for layer in measured])
    neighbours = torch.stack([layer[1].relative_variance for layer in measured])
    return combine_directions(ratios, variances, neighbours, [i // 2 for i in range(len(weights))])


def test_the_mean_and_variance_under_random_signs_are_what_drawing_signs_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(8, 12, generator=generator)
    direction = torch.randn(12, 1, generator=generator) ** 3
    found = alignment(sizes, direction)
    signs = torch.randint(0, 2, (20_000, 8, 12), generator=generator) * 2 - 1
    scaled, unit = sizes / sizes.max(), direction[:, 0] / direction.abs().max()
    drawn = ((signs * scaled) @ unit).square().sum(1)
    assert float(found.expected) == pytest.approx(float(drawn.mean()), rel=0.02)
    assert float(found.variance) == pytest.approx(float(drawn.var()), rel=0.05)


def test_the_length_of_a_direction_and_the_size_of_the_errors_do_not_matter() -> None:
    error, direction = torch.randn(16, 32), torch.randn(32, 2)
    one, other = alignment(error, direction), alignment(error * 1e-9, direction * 1e12)
    torch.testing.assert_close(one.ratio, other.ratio, rtol=1e-4, atol=0)
    torch.testing.assert_close(one.relative_variance, other.relative_variance, rtol=1e-4, atol=0)


def test_nothing_is_said_where_there_is_nothing() -> None:
    nothing = alignment(torch.zeros(4, 8), torch.ones(8, 1))
    no_direction = alignment(torch.randn(4, 8), torch.zeros(8, 1))
    one_input = alignment(torch.randn(4, 8), torch.eye(8)[:, :1])
    for found in (nothing, no_direction, one_input):
        assert float(found.ratio) == pytest.approx(1.0) and torch.isinf(found.relative_variance).all()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "gptq-w4g128", "gguf:Q4_0", "gguf:Q4_K"])
def test_a_direction_planted_in_the_errors_is_found_on_every_grid(format: str) -> None:
    grid = get_grid(format)
    generator = torch.Generator().manual_seed(1)
    columns = 256
    direction = torch.randn(columns, 1, generator=generator)
    weights, planted = [], []
    for _ in range(NUM_LAYERS):
        weight = torch.randn(ROWS, columns, generator=generator) * 0.05
        lattice = grid.lattice_of(weight)
        codes = lattice.dequantize(lattice.nearest)
        # Weights a little off their grid points, all on the side that the direction says: the same codes.
        side = lattice.from_matrix((torch.randn(ROWS, 1, generator=generator).sign() * direction.T.sign()).contiguous())
        off = (lattice.blocks - codes).abs() * side
        moved = torch.where(lattice.frozen, lattice.blocks, codes - 0.3 * off - 0.7 * (codes - lattice.blocks))
        weights.append(weight)
        planted.append(lattice.matrix(moved).contiguous())
    clean = result_of(weights, direction, grid)[0]
    attacked = result_of(planted, direction, grid)[0]
    assert clean.p_value > 1e-3
    assert attacked.p_value < 1e-4 and attacked.whole.size > 0.1


def test_an_attack_on_one_block_is_found_there() -> None:
    grid, generator = get_grid("nf4"), torch.Generator().manual_seed(2)
    direction = torch.randn(COLUMNS, 1, generator=generator)
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) * 0.05 for _ in range(2 * NUM_LAYERS)]
    for number in (4, 5):
        lattice = grid.lattice_of(weights[number])
        error = lattice.matrix(lattice.dequantize(lattice.nearest) - lattice.blocks)
        along = torch.randn(ROWS, 1, generator=generator) * direction.T
        moved = weights[number] + torch.where(error.sign() == along.sign(), 0.0, 0.8) * error
        weights[number] = torch.where(lattice.matrix(lattice.frozen), weights[number], moved)
    found = result_of(weights, direction, grid)[0]
    assert min(range(len(found.blocks)), key=lambda b: found.block_p[b]) == 2 and found.block_p[2] < 1e-4


def test_p_values_of_random_weights_are_uniform_against_signs_and_never_too_small_together() -> None:
    grid, generator = get_grid("nf4"), torch.Generator().manual_seed(3)
    p_signs, together = [], []
    for trial in range(40):
        weights = [torch.randn(ROWS, COLUMNS, generator=generator) * 0.05 for _ in range(NUM_LAYERS)]
        found = result_of(weights, torch.randn(COLUMNS, 6, generator=generator), grid, trial)
        p_signs += [result.whole.p_signs for result in found]
        together += [result.whole.p_value for result in found]
    assert stats.kstest(p_signs, "uniform").pvalue > 1e-3
    assert sum(p < 0.05 for p in together) / len(together) < 0.07
