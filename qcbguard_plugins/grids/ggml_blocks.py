"""How ggml packs a tensor: bytes of blocks to codes, scales and offsets.

A ggml type cuts a row into blocks of 32 weights or super-blocks of 256. Both fall into *sub-blocks* of 16 or 32
weights, each with one scale and one offset, so every stored weight is ``levels[code] * scale + offset``. The unpacking
below multiplies in ggml's own order, which makes the values bit-equal to ggml's ``dequantize_row_*``.

References:
    ggml ``ggml-common.h`` (block layouts) and ``ggml-quants.c`` (``dequantize_row_*``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The codebook of IQ4_NL and IQ4_XS (ggml's kvalues_iq4nl).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class StoredBlocks:
    """An unpacked tensor.

    Attributes:
        codes: uint8 ``[num_sub_blocks, sub_block_size]``, indices into the levels of the type.
        scale: float32 ``[num_sub_blocks, 1]``; may be negative or zero.
        offset: float32 ``[num_sub_blocks, 1]``.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


@dataclass(frozen=True)
class BlockType:
    """One quantized type of ggml.

    Attributes:
        name: ggml's name, such as ``Q4_K``.
        number: Its number in ``enum ggml_type``, which GGUF files store.
        block_size: Weights a block.
        block_bytes: Bytes a block.
        sub_block_size: Weights that share a scale.
        levels: Stored integer of each code.
        unpack: Bytes ``[num_blocks, block_bytes]`` to codes, scale and offset, shaped by block.
        searched: True where the scale comes from a search and not from a formula.
        fallback: The type that llama.cpp takes for rows that the block size does not divide; empty where every row of a
            multiple of 32 fits.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int
    sub_block_size: int
    levels: tuple[int, ...]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    searched: bool
    fallback: str = ""

    @property
    def has_offset(self) -> bool:
        """True where sub-blocks have an offset of their own: codes count up from it, and both ends hold the scale."""
        return self.levels[0] == 0

    @property
    def is_narrow(self) -> bool:
        """True where a code fits half a byte."""
        return len(self.levels) <= 16

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of a row of this many weights."""
        return num_columns // self.block_size * self.block_bytes

    def read(self, packed: Tensor) -> StoredBlocks:
        """Unpack uint8 bytes of whole blocks, in any shape."""
        codes, scale, offset = self.unpack(packed.reshape(-1, self.block_bytes))
        return StoredBlocks(codes.reshape(-1, self.sub_block_size), scale.reshape(-1, 1), offset.reshape(-1, 1))


def _half(packed: Tensor, start: int) -> Tensor:
    """The float16 at a byte offset of every block, as float32 ``[num_blocks, 1]``."""
    return packed[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """4-bit codes: of every ``group`` bytes first all low halves, then all high halves."""
    bytes_ = packed.reshape(packed.shape[0], -1, 1, group)
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=2).reshape(packed.shape[0], -1)


def _pairs(packed: Tensor) -> Tensor:
    """2-bit codes of Q2_K and Q3_K: of every 32 bytes four runs of 32 codes, lowest bits first."""
    bytes_ = packed.reshape(packed.shape[0], -1, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    return ((bytes_ >> shifts) & 3).reshape(packed.shape[0], -1)


def _bits(packed: Tensor, num_bits: int = 8) -> Tensor:
    """Bit ``i`` of every byte as run ``i``: ``[num_blocks, num_bits * num_bytes]`` of 0 and 1."""
    shifts = torch.arange(num_bits, dtype=torch.uint8).view(1, num_bits, 1)
    return ((packed.unsqueeze(1) >> shifts) & 1).reshape(packed.shape[0], -1)


def _none(scale: Tensor) -> Tensor:
    return torch.zeros_like(scale)


def _fifth_bits(packed: Tensor) -> Tensor:
    """The 32 high bits of Q5_0 and Q5_1, bit ``j`` of the little-endian word for weight ``j``."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(2) >> shifts) & 1).reshape(packed.shape[0], 32)


def _q4_0(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(packed, 0)
    return _nibbles(packed[:, 2:], 16), scale, _none(scale)


def _q4_1(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _nibbles(packed[:, 4:], 16), _half(packed, 0), _half(packed, 2)


def _q5_0(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(packed, 0)
    return _nibbles(packed[:, 6:], 16) | (_fifth_bits(packed[:, 2:6]) << 4), scale, _none(scale)


def _q5_1(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _nibbles(packed[:, 8:], 16) | (_fifth_bits(packed[:, 4:8]) << 4)
    return codes, _half(packed, 0), _half(packed, 2)


def _q8_0(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = _half(packed, 0)
    return packed[:, 2:] ^ 128, scale, _none(scale)


def _q2_k(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed_scales = packed[:, :16]
    scale = _half(packed, 80) * (packed_scales & 15)
    return _pairs(packed[:, 16:80]), scale, -(_half(packed, 82) * (packed_scales >> 4))


def _q3_k(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _pairs(packed[:, 32:96]) | (_bits(packed[:, :32]) << 2)
    low = _nibbles(packed[:, 96:104], 8)
    high = ((packed[:, 104:108].unsqueeze(1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 4, 1)) & 3) << 4
    steps = (low | high.reshape(-1, 16)).float() - 32
    scale = _half(packed, 108) * steps
    return codes, scale, _none(scale)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and the eight 6-bit mins that Q4_K and Q5_K keep in 12 bytes."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    mins = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales, mins


def _q4_k(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, mins = _six_bit_scales(packed[:, 4:16])
    return _nibbles(packed[:, 16:144], 32), _half(packed, 0) * scales, -(_half(packed, 2) * mins)


def _q5_k(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, mins = _six_bit_scales(packed[:, 4:16])
    codes = _nibbles(packed[:, 48:176], 32) | (_bits(packed[:, 16:48]) << 4)
    return codes, _half(packed, 0) * scales, -(_half(packed, 2) * mins)


def _q6_k(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Of every 128 weights: 64 bytes of low halves in two runs of low and two of high nibbles, 32 bytes of high pairs.
    low = _nibbles(packed[:, :128], 64)
    high = _pairs(packed[:, 128:192])
    scale = _half(packed, 208) * packed[:, 192:208].contiguous().view(torch.int8)
    return low | (high << 4), scale, _none(scale)


def _iq4_xs(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = torch.stack([packed[:, 4:8] & 15, packed[:, 4:8] >> 4], dim=2).reshape(-1, 8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    high = ((packed[:, 2:4].unsqueeze(2) >> shifts) & 3).reshape(-1, 8) << 4
    scale = _half(packed, 0) * ((low | high).float() - 32)
    return _nibbles(packed[:, 8:136], 16), scale, _none(scale)


def _integers(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


_ALL = (
    BlockType("Q4_0", 2, 32, 18, 32, _integers(-8, 7), _q4_0, searched=False),
    BlockType("Q4_1", 3, 32, 20, 32, _integers(0, 15), _q4_1, searched=False),
    BlockType("Q5_0", 6, 32, 22, 32, _integers(-16, 15), _q5_0, searched=False),
    BlockType("Q5_1", 7, 32, 24, 32, _integers(0, 31), _q5_1, searched=False),
    BlockType("Q8_0", 8, 32, 34, 32, _integers(-128, 127), _q8_0, searched=False),
    BlockType("Q2_K", 10, 256, 84, 16, _integers(0, 3), _q2_k, searched=True, fallback="Q4_0"),
    BlockType("Q3_K", 11, 256, 110, 16, _integers(-4, 3), _q3_k, searched=True, fallback="Q4_0"),
    BlockType("Q4_K", 12, 256, 144, 32, _integers(0, 15), _q4_k, searched=True, fallback="Q5_0"),
    BlockType("Q5_K", 13, 256, 176, 32, _integers(0, 31), _q5_k, searched=True, fallback="Q5_1"),
    BlockType("Q6_K", 14, 256, 210, 16, _integers(-32, 31), _q6_k, searched=True, fallback="Q8_0"),
    BlockType("IQ4_NL", 20, 32, 18, 32, IQ4_LEVELS, _q4_0, searched=True),
    BlockType("IQ4_XS", 23, 256, 136, 32, IQ4_LEVELS, _iq4_xs, searched=True, fallback="IQ4_NL"),
)
BLOCK_TYPES = {block_type.name: block_type for block_type in _ALL}
