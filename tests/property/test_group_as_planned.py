"""A weight guarded on integer groups is stored as planned, in every dtype, and its scales are found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import Stochastic
from qcbguard_plugins.grids import AffineGrid
from qcbguard_plugins.rounding.guard_weight import guard_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["gaussian", "positive", "shifted", "negative", "many magnitudes", "sparse"]


def weight_of(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(16, 256, generator=generator) * 0.02
    return {
        "gaussian": random,
        "positive": random.abs(),
        "shifted": random + 0.05,
        "negative": -random.abs() - 1e-3,
        "many magnitudes": random * torch.logspace(-3, 1, 16)[:, None],
        "sparse": random * (torch.rand(16, 256, generator=generator) < 0.05),
    }[kind]


GPTQ_FORMATS = [f"gptq-w{bits}{group}{span}" for bits in range(2, 9) for group in ("g32", "") for span in ("", "-asym")]
TOOLCHAIN_FORMATS = [
    "torchao:int8", "torchao:int4-g32", "onnx:int8", "openvino:int8", "openvino:int8-sym", "openvino:int4-g32",
    "openvino:int4-g64-sym", "compressed-tensors:int4-g128", "compressed-tensors:int4-g32-asym",
    "quanto:int8", "onnx:uint8", "onnx:int8-tensor", "hqq:int4-g64",
    "quanto:int4-g128", "autoround:int4-g64",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    format_name=st.sampled_from(GPTQ_FORMATS + TOOLCHAIN_FORMATS),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_planned_codes_are_stored(format_name: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    grid = get_grid(format_name)
    # bfloat16 cannot hold all levels of 8 bits; where whole blocks consist of such weights the guard refuses.
    assume(not (kind == "sparse" and dtype == torch.bfloat16 and grid.num_bits >= 7))
    guarded = guard_weight(weight_of(kind, seed).to(dtype), grid, Stochastic(), seed=seed, name="weight")
    assert torch.equal(grid.quantize(guarded.weight), guarded.codes)


@pytest.mark.parametrize("kind", ["gaussian", "shifted", "negative"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_the_planned_scale_is_found_again(num_bits: int, symmetric: bool, kind: str) -> None:
    """And with it, without symmetry, every weight lies on the grid: nothing is left for GPTQ to feed forward."""
    grid = AffineGrid(num_bits, 64, symmetric)
    weight = weight_of(kind, 0)
    planned = grid.lattice(grid.move_scale_holders(weight.view(-1, 64)), (16, 256), torch.float32)
    guarded = guard_weight(weight, grid, Stochastic(), seed=0, name="weight")
    found = grid.lattice_of(guarded.weight)
    assert torch.allclose(found.scale, planned.scale, rtol=1e-6)
    if not symmetric:
        error = (found.dequantize(found.nearest) - found.blocks).abs() / found.scale
        assert error.max() < 1e-4


def test_the_ends_of_a_group_stay_where_the_quantizer_stores_them() -> None:
    """Moving the ends onto the grid changes no stored value but at exact ties."""
    grid = AffineGrid(4, 32, symmetric=False)
    blocks = weight_of("shifted", 3).view(-1, 32)
    before, after = (grid.lattice(b, (16, 256), torch.float32) for b in (blocks, grid.move_scale_holders(blocks)))
    ends = before.frozen
    assert torch.allclose(
        before.dequantize(before.nearest)[ends], after.dequantize(after.nearest)[ends], rtol=1e-5, atol=1e-8
    )
