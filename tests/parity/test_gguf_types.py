"""GGUF grids against ggml itself and against gguf-py."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.backends.ggml.library import load_library
from qcbguard_plugins.grids.ggml import FormulaGrid
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from tests.helpers.gguf_files import LLAMA_CPP, needs_llama_cpp, normal

FORMULA = [name for name, block_type in BLOCK_TYPES.items() if not block_type.searched]


def hard_weight() -> Tensor:
    """Rows of very different sizes, ties, zeros, a lone outlier, both signs of the largest magnitude."""
    weight = normal(48, 512)
    weight *= torch.exp(3 * normal(48, 1, seed=1, std=1.0))
    weight[3] = 0
    weight[4, :256] = 0.5
    weight[5, ::2], weight[5, 1::2] = 1.0, -1.0
    weight[6] = torch.arange(512) / 64 - 4
    weight[7, 100] = 50.0
    weight[8] *= 1e-6
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMULA)
def test_formulas_store_ggmls_bits(name: str, dtype: torch.dtype) -> None:
    weight, block_type = hard_weight().to(dtype), BLOCK_TYPES[name]
    ours = FormulaGrid(block_type).stored(weight)
    theirs = block_type.read(load_library().quantize(block_type, weight.float()))
    for mine, real in zip(
        (ours.codes, ours.scale, ours.offset), (theirs.codes, theirs.scale, theirs.offset), strict=True
    ):
        assert torch.equal(mine, real)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_unpacked_values_are_ggmls_bits(name: str) -> None:
    block_type = BLOCK_TYPES[name]
    packed = load_library().quantize(block_type, hard_weight())
    expected = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
    values = gguf_grid(name).values(block_type.read(packed)).view(48, 512)
    assert torch.equal(values, torch.from_numpy(expected))
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block_type.block_size, block_type.block_bytes)
    assert gguf.GGMLQuantizationType[name] == block_type.number


@pytest.mark.parametrize("name", FORMULA)
def test_formulas_agree_with_gguf_py(name: str) -> None:
    packed = gguf.quants.quantize(normal(16, 256).numpy(), gguf.GGMLQuantizationType[name])
    theirs = BLOCK_TYPES[name].read(torch.from_numpy(packed))
    assert torch.equal(FormulaGrid(BLOCK_TYPES[name]).quantize(normal(16, 256)), theirs.codes.view(16, 256))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_threads_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, block_type = normal(40, 512), BLOCK_TYPES[name]
    whole = load_library().quantize(block_type, weight)
    monkeypatch.setattr("qcbguard_plugins.backends.ggml.library._WEIGHTS_PER_CHUNK", 1024)
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert torch.equal(load_library().quantize(block_type, weight), whole)


@needs_llama_cpp
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_wheel_and_a_build_of_ones_own_store_the_same_bytes(name: str) -> None:
    (path,) = {file.resolve() for file in (LLAMA_CPP / "build" / "bin").glob("libggml-base.so")}
    own, importance = load_library(path), normal(512, std=1.0).abs()
    assert "ggml" in own.version
    for columns in (None, importance):
        weight, block_type = hard_weight(), BLOCK_TYPES[name]
        assert torch.equal(
            own.quantize(block_type, weight, columns), load_library().quantize(block_type, weight, columns)
        )
