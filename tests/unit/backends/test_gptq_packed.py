"""The reader of GPTQ's packed words, on words packed here by the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.gptq.packed import read_packed
from qcbguard_plugins.errors import CheckpointError


def pack(values: Tensor, num_bits: int) -> Tensor:
    """Values ``[n, m]`` as one string of bits a column, lowest first, in words of 32."""
    rows = []
    for column in values.T.tolist():
        bits = sum(value << (num_bits * i) for i, value in enumerate(column))
        words = [(bits >> (32 * i)) & 0xFFFFFFFF for i in range(values.shape[0] * num_bits // 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32).T.contiguous()


@pytest.mark.parametrize("zero_offset", [0, 1], ids=["gptq_v2", "gptq"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_codes_and_zero_points_are_read_back(num_bits: int, zero_offset: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**num_bits, (96, 64), generator=generator)
    zeros = torch.randint(2**num_bits, (3, 64), generator=generator)
    stored = (zeros - zero_offset) % 2**num_bits
    layer = read_packed(
        {
            "qweight": pack(codes, num_bits),
            "qzeros": pack(stored.T, num_bits).T.contiguous(),
            "scales": torch.ones(3, 64),
            "g_idx": torch.arange(96) // 32,
        },
        num_bits,
        zero_offset=zero_offset,
    )
    assert torch.equal(layer.codes.long(), codes.T)
    assert torch.equal(layer.zero_points.long(), zeros)
    assert torch.equal(layer.dequantize(), (codes - zeros[torch.arange(96) // 32]).T.float())


def valid() -> dict[str, Tensor]:
    words = torch.zeros(4, 64, dtype=torch.int32)
    return {
        "qweight": words,
        "qzeros": torch.zeros(1, 8, dtype=torch.int32),
        "scales": torch.ones(1, 64),
        "g_idx": torch.zeros(32, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, "lacks qzeros"),
        ({"qweight": torch.zeros(4, 64)}, "not int32"),
        ({"scales": torch.ones(1, 32)}, "do not go together"),
        ({"g_idx": torch.full((32,), 9)}, "do not go together"),
    ],
    ids=["missing", "dtype", "shape", "group"],
)
def test_a_malformed_layer_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in (valid() | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        read_packed(tensors, 4, zero_offset=0)


def test_bits_that_cannot_be_read_are_named() -> None:
    with pytest.raises(CheckpointError, match="5-bit"):
        read_packed(valid(), 5, zero_offset=0)
