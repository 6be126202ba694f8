"""Digests of what a stock quantizer stores for a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcbguard_plugins.grids.ggml_blocks import BlockType, StoredBlocks


def codes_digest(codes: Tensor) -> str:
    """SHA-256 of the codes of one weight, row by row, a byte each."""
    return hashlib.sha256(codes.cpu().contiguous().numpy().data).hexdigest()


def blocks_digest(stored: StoredBlocks, block_type: BlockType, num_rows: int) -> str:
    """SHA-256 over what a GGUF tensor stores, its codes, scales and offsets, with its rows in any order.

    llama.cpp's converter reorders the rows of some matrices (the query and key projections of Llama), so a plan that
    was made on a Hugging Face folder is compared regardless of it.
    """
    return digest_of_rows(row_digests(pack_rows(stored, block_type, num_rows)))


def stacked_digest(digests: Sequence[str]) -> str:
    """The digest of a stack of matrices; of a single one it is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the digests of named tensors, whatever their order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


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
