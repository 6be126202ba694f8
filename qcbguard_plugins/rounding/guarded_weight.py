"""A guarded weight and the plan for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcbguard_plugins.grids.ggml_blocks import BlockType, StoredBlocks


def stacked_digest(digests: Sequence[str]) -> str:
    """The digest of a stack of matrices; of a single one it is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


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
        num_landed: Number of weights that the stock quantizer stores as the defense chose; all of them where the scale
            follows from a formula.
        digest: SHA-256 of the plan in hexadecimal: :func:`codes_digest`, or :func:`blocks_digest` for GGUF.
        energy: Sum of the squared weights.
        settled: Parameters that the method chose by itself.
    """

    weight: Tensor
    codes: Tensor
    num_moved: int
    num_frozen: int
    relative_change: float
    num_landed: int
    digest: str
    energy: float = 0.0
    settled: Mapping[str, float | str] = field(default_factory=dict)


def pack_rows(stored: StoredBlocks, block_type: BlockType, num_rows: int) -> NDArray[np.uint8]:
    """What each row of a GGUF tensor stores, as bytes.

    Returns:
        uint8 ``[num_rows, row_bytes]``: the codes, the scales and, where the type has any, the offsets, both as float32
        without the sign of a zero. Codes of at most four bits share a byte: one of the first half of the row in its low
        bits, one of the second half in its high bits.
    """
    values = [stored.scale, stored.offset] if block_type.has_offset else [stored.scale]
    codes, *parts = (
        part.cpu().contiguous().view(torch.uint8).view(num_rows, -1).numpy()
        for part in (stored.codes, *(value + 0.0 for value in values))
    )
    half = codes.shape[1] // 2
    packed = np.left_shift(codes[:, half:], 4) | codes[:, :half] if block_type.is_narrow else codes
    return np.concatenate([packed, *parts], axis=1)


def row_digests(packed_rows: NDArray[np.uint8]) -> list[bytes]:
    """SHA-256 of each row; see :func:`pack_rows`."""
    return [hashlib.sha256(row).digest() for row in packed_rows]


def digest_of_rows(digests: Iterable[bytes]) -> str:
    """One SHA-256 over the digests of rows, in any order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
