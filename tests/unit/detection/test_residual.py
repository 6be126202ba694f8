from __future__ import annotations

import pytest
import torch

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.detection.weights.null_grids import draw_inflations, generator_for, roundings
from qcbguard_plugins.detection.weights.residual import NUM_BINS, cell_shape, divergence, divergences, histogram
from qcbguard_plugins.detection.weights.thresholds import BOX, GRID_FINE_TUNE, NO_BOX, TIGHTENED_BOX, family_of
from qcbguard_plugins.lab.attacks.straight_through import quantize
from tests.helpers.detection_models import boxed_weight, random_weight


def _histograms(weight: torch.Tensor, format: str) -> torch.Tensor:
    inflations = draw_inflations(generator_for(0, "grids"))
    return torch.stack([histogram(r.position) for r in roundings(weight, get_grid(format), inflations)])


def test_a_histogram_sums_to_one_and_knows_its_bins() -> None:
    shares = histogram(torch.tensor([0.0, 0.01, 0.5, 1.0]))
    assert shares.shape == (NUM_BINS,) and float(shares.sum()) == pytest.approx(1.0)
    assert shares[0] == 0.5 and shares[NUM_BINS // 2] == 0.25 and shares[-1] == 0.25
    assert float(histogram(torch.empty(0)).sum()) == 0.0


def test_equal_histograms_have_no_divergence() -> None:
    shares = histogram(torch.rand(10_000, generator=generator_for(0, "uniform")))
    assert divergence(shares, shares) == 0.0


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_a_clean_weight_looks_like_its_neighbours(format: str) -> None:
    own, others = divergences(_histograms(random_weight(0).half(), format))
    assert own < 3 * max(others)
    assert family_of(cell_shape(_histograms(random_weight(0).half(), format))) is NO_BOX


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(("eps", "family"), [(0.02, BOX), (0.25, TIGHTENED_BOX)])
def test_a_box_leaves_its_mark_and_its_name(format: str, eps: float, family: object) -> None:
    histograms = _histograms(boxed_weight(0, format, eps), format)
    own, others = divergences(histograms)
    assert own > 2 * max(others)
    shape = cell_shape(histograms)
    assert family_of(shape) is family
    assert shape.peak_margin == pytest.approx(eps, abs=0.05)


def test_a_fine_tune_of_a_dequantized_weight_is_named() -> None:
    weight = quantize(random_weight(0), get_grid("nf4"))
    weight = weight + 5e-4 * torch.randn(128, 1, generator=generator_for(0, "a")) @ torch.randn(1, 192)
    assert family_of(cell_shape(_histograms(weight, "nf4"))) is GRID_FINE_TUNE
