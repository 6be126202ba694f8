"""The grid of integer groups: against GPTQModel's own quantizer, and by what must hold anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids import AffineGrid

BITS = [2, 3, 4, 5, 6, 8]
GROUPS = [32, 64, 128, None]


def weight_of(kind: str) -> Tensor:
    random = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    return {
        "random": random,
        "positive": random.abs(),
        "shifted": random + 0.05,
        "zeros": torch.zeros(4, 256),
        "bf16": random.bfloat16(),
    }[kind]


@pytest.mark.parametrize("kind", ["random", "positive", "shifted", "zeros", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("num_bits", BITS)
def test_codes_equal_gptqmodels(num_bits: int, group_size: int | None, symmetric: bool, kind: str) -> None:
    pytest.importorskip("gptqmodel", reason="GPTQModel pins its own versions; install it to compare with it")
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer

    weight = weight_of(kind)
    grid = AffineGrid(num_bits, group_size, symmetric)
    lattice = grid.lattice_of(weight)
    quantizer = Quantizer(QuantizeConfig(bits=4, group_size=group_size or -1, sym=symmetric), name="hf_optimum")
    quantizer.qcfg.bits = num_bits
    quantizer.configure(perchannel=True)
    width = group_size or weight.shape[1]
    expected = []
    for group in weight.float().split(width, dim=1):
        quantizer.find_params(group, weight=True)
        expected.append(quantizer.quantize(group))
    ours = lattice.matrix(lattice.dequantize(lattice.nearest))
    assert torch.allclose(ours, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("num_bits", BITS)
def test_nearest_is_within_half_a_step_inside_the_range(num_bits: int, symmetric: bool) -> None:
    grid = AffineGrid(num_bits, 64, symmetric)
    lattice = grid.lattice_of(weight_of("random"))
    inside = (lattice.coordinate > 0) & (lattice.coordinate < grid.num_levels - 1)
    error = (lattice.dequantize(lattice.nearest) - lattice.blocks).abs() / lattice.scale
    assert error[inside].max() <= 0.5 + 1e-4
    assert torch.equal(lattice.matrix(lattice.nearest), grid.quantize(weight_of("random")))
    assert lattice.frozen.any(dim=1).all()


def test_names_are_read_back() -> None:
    for name in ("gptq-w4g128", "gptq-w8", "gptq-w3g32-asym"):
        assert get_grid(name).name == name
    for name in ("gptq-w1g128", "gptq-w9", "gptq-w4g100"):
        with pytest.raises(UsageError):
            get_grid(name)
