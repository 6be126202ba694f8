"""Read what GPTQ stores: codes in 32-bit words, zero points, scales, and the group of each column.

The values of a column stand one after the other, lowest bits first, and may straddle two words (3 bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.errors import CheckpointError

_WORD_BITS = 32
# 5, 6 and 7 bits are stored in planes, in a layout that only GPTQModel has.
READABLE_BITS = (2, 3, 4, 8)
PACKED_NAMES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class PackedLayer:
    """One linear layer as GPTQ stores it.

    Attributes:
        codes: uint8 ``[out_features, in_features]``.
        zero_points: uint8 ``[num_groups, out_features]``.
        scales: Float ``[num_groups, out_features]``.
        groups: int64 ``[in_features]``, the group of each column.
    """

    codes: Tensor
    zero_points: Tensor
    scales: Tensor
    groups: Tensor

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``."""
        zero_points = self.zero_points.T[:, self.groups]
        return (self.codes.float() - zero_points) * self.scales.T[:, self.groups].float()


def read_packed(tensors: Mapping[str, Tensor], num_bits: int, *, zero_offset: int) -> PackedLayer:
    """Unpack one layer.

    Args:
        tensors: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``.
        num_bits: 2, 3, 4 or 8.
        zero_offset: What the format subtracts from zero points before it stores them: 1 for ``gptq``, 0 for
            ``gptq_v2``.

    Raises:
        CheckpointError: A tensor is missing, or does not have the shape that the others ask for.
    """
    if num_bits not in READABLE_BITS:
        raise CheckpointError(f"{num_bits}-bit codes of GPTQ cannot be read", remedy="Readable: 2, 3, 4 and 8 bits.")
    missing = [name for name in PACKED_NAMES if name not in tensors]
    if missing:
        raise CheckpointError(f"a layer of GPTQ lacks {', '.join(missing)}")
    qweight, qzeros, scales, groups = (tensors[name] for name in PACKED_NAMES)
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        raise CheckpointError(f"codes are stored as {qweight.dtype} and zero points as {qzeros.dtype}, not int32")
    codes = _unpack(qweight, num_bits).T.contiguous()
    zero_points = ((_unpack(qzeros.T, num_bits).T.int() + zero_offset) % 2**num_bits).to(torch.uint8)
    columns, rows = groups.numel(), scales.shape[1]
    if codes.shape != (rows, columns) or zero_points.shape != scales.shape or int(groups.max()) >= scales.shape[0]:
        raise CheckpointError(
            f"a layer of GPTQ has codes {tuple(codes.shape)}, zero points {tuple(zero_points.shape)}, scales "
            f"{tuple(scales.shape)} and {columns} columns, which do not go together"
        )
    return PackedLayer(codes, zero_points, scales, groups.long())


def _unpack(words: Tensor, num_bits: int) -> Tensor:
    """Values from int32 ``[num_words, n]``: uint8 ``[num_words * 32 / num_bits, n]``."""
    if words.shape[0] * _WORD_BITS % num_bits:
        raise CheckpointError(f"{words.shape[0]} words of 32 bits do not hold whole {num_bits}-bit values")
    start = torch.arange(0, words.shape[0] * _WORD_BITS, num_bits)
    word, shift = start // _WORD_BITS, (start % _WORD_BITS)[:, None]
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    padded = torch.cat([unsigned, torch.zeros_like(unsigned[:1])])
    values: Tensor = (padded[word] >> shift | padded[word + 1] << (_WORD_BITS - shift)) & (2**num_bits - 1)
    return values.to(torch.uint8)
