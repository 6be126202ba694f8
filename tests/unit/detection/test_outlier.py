from __future__ import annotations

import torch

from qcbguard_plugins.detection.weights.null_grids import generator_for
from qcbguard_plugins.detection.weights.outlier import CHUNK, layer_distance, outlier_test, ratios
from tests.helpers.detection_models import random_weight


def _planted() -> torch.Tensor:
    weight = random_weight(0)
    chunks = weight.view(weight.shape[0], -1, CHUNK)
    chunks.scatter_(2, chunks.abs().argmax(2, keepdim=True), chunks.amax(2, keepdim=True) * 300)
    return weight


def test_planted_outliers_are_found() -> None:
    evidence = outlier_test(_planted(), generator_for(0, "x"))
    assert evidence.share > 0.95 and evidence.shuffled_share < 0.6 and evidence.p_value < 1e-20


def test_a_clean_weight_has_none() -> None:
    evidence = outlier_test(random_weight(1), generator_for(0, "x"))
    assert evidence.share == 0.0 and evidence.p_value == 1.0


def test_natural_outliers_are_not_planted_ones() -> None:
    """A huge column rules one chunk of each row, and single huge weights anywhere rule as many as chance allows."""
    column = random_weight(2)
    column[:, 7] *= 300
    scattered = random_weight(3)
    scattered[torch.rand(scattered.shape, generator=generator_for(0, "places")) < 0.01] *= 300
    for weight in (column, scattered):
        evidence = outlier_test(weight, generator_for(0, "x"))
        assert evidence.share > 0.1 and evidence.p_value > 1e-4


def test_layers_are_compared() -> None:
    clean = ratios(random_weight(1))
    assert layer_distance(ratios(random_weight(0)), clean) < 0.1
    assert layer_distance(ratios(_planted()), clean) > 0.9
    assert layer_distance(torch.empty(0), clean) == 0.0


def test_narrow_weights_are_left_out() -> None:
    assert outlier_test(torch.ones(16, 16), generator_for(0, "x")).p_value == 1.0
