"""Digests of what a stock quantizer stores for a weight."""

from __future__ import annotations

import hashlib

from torch import Tensor

from qcbguard_plugins.grids.ggml_blocks import BlockType, StoredBlocks
from qcbguard_plugins.rounding.guarded_weight import digest_of_rows, pack_rows, row_digests


def codes_digest(codes: Tensor) -> str:
    """SHA-256 of the codes of one weight, row by row, a byte each."""
    return hashlib.sha256(codes.cpu().contiguous().numpy().data).hexdigest()


def blocks_digest(stored: StoredBlocks, block_type: BlockType, num_rows: int) -> str:
    """SHA-256 over what a GGUF tensor stores, its codes, scales and offsets, with its rows in any order.

    llama.cpp's converter reorders the rows of some matrices (the query and key projections of Llama), so a plan that
    was made on a Hugging Face folder is compared regardless of it.
    """
    return digest_of_rows(row_digests(pack_rows(stored, block_type, num_rows)))
