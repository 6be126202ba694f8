from __future__ import annotations

import pytest
import torch

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.detection.behaviour.sign_randomization import (
    divergence,
    rounded,
    sign_randomization_test,
    sign_randomized,
)
from qcbguard_plugins.detection.weights.null_grids import generator_for
from tests.helpers.detection_models import random_weight


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_errors_keep_their_magnitudes_and_lose_their_signs(format: str) -> None:
    weight = random_weight(0)
    new = rounded(weight, get_grid(format))
    error = new - weight
    random_error = sign_randomized(weight, new, generator_for(0, "w")) - weight
    torch.testing.assert_close(random_error.abs(), error.abs(), rtol=1e-3, atol=1e-7)
    correlation = float((random_error * error).sum() / error.square().sum())
    assert abs(correlation) < 0.05


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert float(divergence(p.log(), q.log())) == pytest.approx(float(expected), abs=1e-6)
    assert float(divergence(p.log(), p.log())) == 0.0


def test_a_ratio_beyond_the_draws_is_significant() -> None:
    draws = [0.030, 0.031, 0.029, 0.0305, 0.0295, 0.030]
    assert sign_randomization_test(0.088, draws).p_mean < 1e-5
    assert sign_randomization_test(0.0302, draws).p_mean > 0.2
