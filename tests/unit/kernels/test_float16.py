"""Numbers of 16 bits as kernels read and write them: every one of them."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from qcbguard_plugins._kernels import float16 as half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_is_read_and_written_as_torch_does(dtype):
    bits = np.arange(1 << 16).astype(np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float()
    values = np.empty(len(bits), np.float32)
    half.load(bits, half.DTYPES[dtype], values)
    read, finite = torch.from_numpy(values), expected.isfinite()
    assert torch.equal(read[finite].view(torch.int32), expected[finite].view(torch.int32))
    assert not read[~finite].isfinite().any()

    written = np.empty_like(bits)
    half.store(values, half.DTYPES[dtype], written)
    assert np.array_equal(written[finite.numpy()], bits[finite.numpy()])


def test_float32_is_copied():
    values, written = np.array([0.5, -0.0, 3e-40], np.float32), np.empty(3, np.float32)
    half.store(values, half.FLOAT32, written)
    assert np.array_equal(written.view(np.int32), values.view(np.int32))
