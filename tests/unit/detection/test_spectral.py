from __future__ import annotations

import pytest
import torch

from qcbguard_plugins.detection.weights.null_grids import generator_for
from qcbguard_plugins.detection.weights.spectral import edge_ratio, starting_vectors


@pytest.mark.parametrize("shape", [(256, 256), (256, 640), (96, 400)])
def test_white_noise_sits_at_the_edge(shape: tuple[int, int]) -> None:
    generator = generator_for(0, "noise")
    noise = torch.randn(shape, generator=generator)
    assert edge_ratio(noise, starting_vectors(shape[1], generator)) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("strength", [1.5, 2.0, 4.0])
def test_a_planted_direction_is_measured(strength: float) -> None:
    """A rank-one spike of s edges moves the top singular value to its well-known place above the edge."""
    generator = generator_for(1, "spike")
    size = 400
    u, v = (torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0) for _ in range(2))
    planted = torch.randn(size, size, generator=generator) + strength * 2 * size**0.5 * torch.outer(u, v)
    exact = float(torch.linalg.svdvals(planted)[0])
    edge = float(torch.linalg.vector_norm(planted)) / size * 2 * size**0.5
    measured = edge_ratio(planted, starting_vectors(size, generator))
    assert measured == pytest.approx(exact / edge, rel=0.02)
    assert measured > 1.2


def test_scale_does_not_matter_and_zero_is_zero() -> None:
    generator = generator_for(2, "scale")
    noise = torch.randn(64, 80, generator=generator)
    start = starting_vectors(80, generator)
    assert edge_ratio(noise * 1e-6, start) == pytest.approx(edge_ratio(noise, start), rel=1e-4)
    assert edge_ratio(torch.zeros(64, 80), start) == 0.0
