"""Sign-randomisation test: does rounding change the behaviour more than random errors of the same sizes?

Rounding moves every weight by some amount. Keep the amounts and draw their signs anew, and a model comes out that is as
inexact as the quantized one and has no reason to be malicious. A clean model's divergence from full precision is the
same for both; that of an attacked model is not, because its rounding errors all point one way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcbguard_plugins.detection.weights.combination import Combined, combine
from qcbguard_plugins.detection.weights.null_grids import sign_surrogate
from qcbguard_plugins.grids.base import Grid


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """What the stock quantizer makes of a weight: float32 in its shape, ``[out_features, in_features]``."""
    lattice = grid.lattice_of(weight)
    codes = lattice.from_matrix(grid.quantize(weight))
    return lattice.matrix(lattice.dequantize(codes))


def sign_randomized(weight: Tensor, rounded_weight: Tensor, generator: torch.Generator) -> Tensor:
    """The weight with rounding errors of the same magnitudes and random signs.

    Args:
        weight: ``[out_features, in_features]``.
        rounded_weight: The same after rounding.
        generator: Source of the signs.

    Returns:
        float32 in the same shape; weights that rounding leaves alone stay as they are.
    """
    original = weight.float()
    return original + sign_surrogate(rounded_weight - original, generator)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL divergence of next-token distributions, in nats.

    Args:
        reference: Log-probabilities ``[num_positions, vocab_size]`` of the full-precision model.
        other: The same of another model.

    Returns:
        float32 ``[num_positions]``, at least 0.
    """
    return (reference.float().exp() * (reference.float() - other.float())).sum(-1).clamp_(min=0)


def sign_randomization_test(quantized: float, randomized: Sequence[float]) -> Combined:
    """Compare the quantized model's mean divergence with those of the sign-randomised models.

    Returns:
        The log of their ratio and its p-value, from a t-distribution over the draws' logarithms.
    """
    return combine(torch.tensor([[quantized, *randomized]], dtype=torch.float64).clamp(min=1e-9))
