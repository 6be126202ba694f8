"""Spectral test: does the rounding error have a direction?

White error has no direction: its largest singular value sits at the random-matrix edge ``std * (sqrt(O) + sqrt(I))``.
In an attacked model the error is the step back from repaired to malicious weights, and a fine-tuning step is low-rank,
so one singular value sticks out. Where in its cell a weight stops does not matter, so a tightened box does not hide it.

References:
    Random-matrix edge: Bai and Yin, Annals of Probability 21 (1993). Subspace iteration: Halko, Martinsson and Tropp,
    SIAM Review 53 (2011), algorithm 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Near the edge singular values lie close together and a few rounds underestimate the largest by about 2 %. The same few
# are spent on the neighbours, so the comparison is fair; the excess of an attack converges in two.
_NUM_VECTORS = 6
_NUM_ROUNDS = 5


def edge_ratio(error: Tensor, start: Tensor) -> float:
    """Largest singular value of an error matrix over the edge of white noise of the same energy.

    Args:
        error: float32 ``[rows, columns]``.
        start: float32 ``[columns, num_vectors]`` from :func:`starting_vectors`, the same for all matrices compared.

    Returns:
        About 1 for white noise (up to a few hundredths less for a large matrix), more where it has a direction, and 0
        for a matrix of zeros.
    """
    rows, columns = error.shape
    energy = float(torch.linalg.vector_norm(error))
    if energy == 0.0:
        return 0.0
    basis = start
    for _ in range(_NUM_ROUNDS):
        basis, _ = torch.linalg.qr(error.T @ (error @ basis))
    largest = float(torch.linalg.matrix_norm(error @ basis, ord=2))
    edge: float = energy / (rows * columns) ** 0.5 * (rows**0.5 + columns**0.5)
    return largest / edge


def starting_vectors(columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal vectors to start :func:`edge_ratio` with: float32 ``[columns, num_vectors]``."""
    start: Tensor = torch.linalg.qr(torch.randn(columns, min(_NUM_VECTORS, columns), generator=generator))[0]
    return start
