"""A guarded weight and the plan for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class GuardedWeight:
    """A guarded weight and the plan for it.

    Attributes:
        weight: ``[out_features, in_features]``, dtype and device of the input; grid points, and frozen weights as they
            were.
        codes: uint8 ``[out_features, in_features]``, the level that the stock quantizer shall store for each weight.
        num_moved: Number of weights whose code differs from plain rounding.
        num_frozen: Number of weights that keep their value.
        relative_change: ``|W' - W| / |W|`` in the Frobenius norm.
        num_as_planned: Number of weights that the stock quantizer stores as the defense chose; all of them where the
            scale follows from a formula.
        digest: SHA-256 of the plan in hexadecimal: :func:`codes_digest`, or :func:`blocks_digest` for GGUF.
        energy: Sum of the squared weights.
        chosen: Parameters that the method chose by itself.
        why_data_free: Why stochastic rounding was used in place of a method that needs calibration; empty where the
            method that was asked for made the choices.
    """

    weight: Tensor
    codes: Tensor
    num_moved: int
    num_frozen: int
    relative_change: float
    num_as_planned: int
    digest: str
    energy: float = 0.0
    chosen: Mapping[str, float | str] = field(default_factory=dict)
    why_data_free: str = ""
