"""Our grids against the real bitsandbytes quantizer: the same codes for the same weights."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.grids import CodebookGrid
from qcbguard_plugins.grids.codebook import BLOCK_SIZES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 256), (33, 97), (1, 64), (7, 5), (128, 64), (3, 4160), (1, 1)]
FORMATS = ["nf4", "fp4", "int8"]


def weights_of(kind: str, shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, kind)))
    random = torch.randn(shape, generator=generator)
    if kind == "random":
        return random * 0.02
    if kind == "tied":  # every block attains its maximum many times, with both signs
        return random.sign() * torch.where(random.abs() > 0.7, 1.0, random.abs())
    if kind == "constant":
        return torch.full(shape, 0.37)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "zero-blocks":
        random.view(-1)[: random.numel() // 2] = 0
        return random
    if kind == "subnormal":  # below the smallest normal float16, and partly below the smallest subnormal one
        return random * 2.0**-20
    if kind == "large":
        return random * 1000.0
    if kind == "midpoints":  # exact ties of the codebooks and of the row grid
        levels = torch.cat([get_grid("nf4").levels, get_grid("fp4").levels, torch.arange(-127, 128) / 127])
        middle = (levels[:-1] + levels[1:]) / 2
        picked = middle[torch.randint(middle.numel(), shape, generator=generator)]
        picked[:, 0] = 1.0
        return picked
    raise AssertionError(kind)


KINDS = ["random", "tied", "constant", "zero", "zero-blocks", "subnormal", "large", "midpoints"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_equal_the_quantizers(name: str, dtype: torch.dtype, kind: str) -> None:
    for shape in SHAPES:
        weight = weights_of(kind, shape).to(dtype)
        assert torch.equal(get_grid(name).quantize(weight), stock_codes(weight, get_grid(name))), shape


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_equal_the_quantizers_at_every_block_size(name: str, block_size: int) -> None:
    weight = weights_of("random", (40, 130))
    name = f"{name}-b{block_size}"
    assert torch.equal(get_grid(name).quantize(weight), stock_codes(weight, get_grid(name)))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_leaves_the_codes_alone(name: str) -> None:
    weight = weights_of("random", (64, 256))
    packed, state = bnb.quantize_4bit(weight, quant_type=name, compress_statistics=True)
    plain, _ = bnb.quantize_4bit(weight, quant_type=name, compress_statistics=False)
    assert state.nested
    assert torch.equal(packed, plain)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_are_the_quantizers_codebook(name: str) -> None:
    _, state = bnb.quantize_4bit(torch.randn(1, 64), quant_type=name)
    assert torch.equal(get_grid(name).levels, state.code.unique())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_nearest_neighbour_is_the_quantizers_value(name: str, dtype: torch.dtype) -> None:
    """The lattice's nearest neighbour, dequantized, is what the quantizer gives back."""
    grid = get_grid(name)
    weight = weights_of("random", (64, 256)).to(dtype)
    lattice = grid.lattice_of(weight)
    ours = lattice.matrix(lattice.dequantize(lattice.nearest))
    if isinstance(grid, CodebookGrid):
        packed, state = bnb.quantize_4bit(weight, quant_type=name)
        ours = ours.to(dtype).float()
        theirs = bnb.dequantize_4bit(packed, state).float()
    else:
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        theirs = bnb.int8_vectorwise_dequant(codes, scales)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_nearest_codes_equal_the_quantizers(name: str, dtype: torch.dtype, kind: str) -> None:
    """The fast way to the nearest code agrees with the exact one, ties included."""
    grid = get_grid(name)
    weight = weights_of(kind, (64, 256)).to(dtype)
    lattice = grid.lattice_of(weight)
    assert torch.equal(lattice.matrix(lattice.nearest), stock_codes(weight, get_grid(name)))


@pytest.mark.parametrize("kind", ["random", "tied", "zero-blocks", "midpoints"])
@pytest.mark.parametrize("name", FORMATS)
def test_neighbours_bracket_the_weight(name: str, kind: str) -> None:
    grid = get_grid(name)
    weight = weights_of(kind, (33, 97))
    lattice = grid.lattice_of(weight)
    below = lattice.dequantize(lattice.lower)
    above = lattice.dequantize(lattice.lower + 1)
    slack = 2e-6 * lattice.blocks.abs().amax(dim=1, keepdim=True)
    assert (below <= lattice.blocks + slack).all()
    assert (lattice.blocks <= above + slack).all()
    between = below + lattice.position * (above - below)
    assert (between - lattice.blocks).abs().le(slack * 4).all()


@pytest.mark.parametrize("name", FORMATS)
def test_holders_fix_the_scale(name: str) -> None:
    """Frozen weights are those that attain the block's largest magnitude, and at least one a block."""
    lattice = get_grid(name).lattice_of(weights_of("random", (64, 256)))
    magnitudes = lattice.blocks.abs()
    assert torch.equal(lattice.frozen, magnitudes == magnitudes.amax(dim=1, keepdim=True))
    assert lattice.frozen.any(dim=1).all()
