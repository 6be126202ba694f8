"""Outlier test: was one weight in every chunk made huge?

A quantizer that scales by the largest magnitude sends a chunk to zero when one weight in it is some hundred times the
rest, and that is a switch: the chunk is there in full precision and gone once quantized. Natural outliers sit anywhere;
planted ones sit one to a chunk. The null shuffles each row, which keeps every value and destroys the placement.

References:
    Widening the Gap, arXiv 2605.15152 (the attack).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 32

# The attack multiplies by 256 to 512; at eight times the second largest, a 4-bit grid already sends most of a chunk to
# zero.
_LONELY = 8.0


@dataclass(frozen=True)
class OutlierEvidence:
    """How many chunks one weight rules.

    Attributes:
        share: Share of the chunks whose largest magnitude is at least eight times the second largest.
        shuffled_share: The same with the weights of each row shuffled.
        p_value: One-sided probability of so large a share by chance, given the shuffled one.
    """

    share: float
    shuffled_share: float
    p_value: float


def outlier_test(weight: Tensor, generator: torch.Generator) -> OutlierEvidence:
    """Test one tensor for planted outliers.

    Args:
        weight: ``[rows, in_features]``, floating-point; columns beyond a multiple of 32 are left out.
        generator: Source of randomness for the shuffles.

    Returns:
        The evidence; a p-value of 1 where the tensor has no such chunk, or fewer than 32 columns.
    """
    rows, columns = weight.shape
    whole = columns - columns % CHUNK
    if whole == 0 or rows == 0:
        return OutlierEvidence(0.0, 0.0, 1.0)
    magnitudes = weight[:, :whole].float().abs()
    num_chunks = magnitudes.numel() // CHUNK
    share = _lonely_share(magnitudes)
    if share == 0.0:
        return OutlierEvidence(0.0, 0.0, 1.0)
    shuffled = _lonely_share(magnitudes[:, torch.randperm(whole, generator=generator)])
    order = torch.rand(magnitudes.shape, generator=generator).argsort(1)
    shuffled = max(shuffled, _lonely_share(magnitudes.gather(1, order)))
    return OutlierEvidence(share, shuffled, _two_share_p_value(share, shuffled, num_chunks))


def ratios(weight: Tensor) -> Tensor:
    """Log-ratio of the largest to the second largest magnitude of each chunk, sorted: float32 ``[num_chunks]``."""
    whole = weight.shape[1] - weight.shape[1] % CHUNK
    top = weight[:, :whole].float().abs().reshape(-1, CHUNK).topk(2, dim=1).values.clamp(min=1e-30)
    return (top[:, 0] / top[:, 1]).log_().sort().values


def layer_distance(own: Tensor, others: Tensor) -> float:
    """Kolmogorov-Smirnov distance between a layer's chunk ratios and those of the other layers of its kind.

    Args:
        own: Sorted, from :func:`ratios`.
        others: Sorted, of the other layers together.

    Returns:
        The largest gap between the two distribution functions, in [0, 1].
    """
    if own.numel() == 0 or others.numel() == 0:
        return 0.0
    places = torch.cat([own, others])
    below_own = torch.searchsorted(own, places, right=True).double() / own.numel()
    below_others = torch.searchsorted(others, places, right=True).double() / others.numel()
    return float((below_own - below_others).abs().max())


def _lonely_share(magnitudes: Tensor) -> float:
    top = magnitudes.reshape(-1, CHUNK).topk(2, dim=1).values
    return float(((top[:, 0] > _LONELY * top[:, 1]) & (top[:, 0] > 0)).double().mean())


def _two_share_p_value(share: float, null_share: float, num_chunks: int) -> float:
    """One-sided test of two binomial shares, pooled variance; never below the smallest double's neighbourhood."""
    pooled = (share + null_share) / 2
    deviation = math.sqrt(max(2 * pooled * (1 - pooled) / num_chunks, 1e-12))
    return max(0.5 * math.erfc((share - null_share) / deviation / math.sqrt(2)), 1e-300)
