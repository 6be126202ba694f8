"""The fast twin of ggml's searches against ggml, and what happens where they differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.ggml.checked import CheckedQuantizer, checked_quantizer, load_kernels
from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.backends.ggml.library import load_library
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids.ggml import FormulaGrid, GgmlGrid, SearchedGrid
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES, StoredBlocks
from qcbguard_plugins.rounding.digests import blocks_digest
from qcbguard_plugins.rounding.guard_weight import guard_weight
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight
from tests.helpers.gguf_files import normal
from tests.parity.test_gguf_types import hard_weight

pytest.importorskip("numba")
from qcbguard_plugins._kernels.ggml.quantizer import quantize

SEARCHED = [name for name, block_type in BLOCK_TYPES.items() if block_type.searched]
WEIGHED = [name for name in BLOCK_TYPES if name != "Q8_0"]


def difficult() -> dict[str, Tensor]:
    """Weights at which a search may take another turn."""
    grid_points = guard_weight(normal(24, 512), gguf_grid("Q4_K"), get_defense("stochastic"), seed=0, name="w").weight
    constant = torch.full((24, 512), -0.3) + normal(24, 512, std=1e-7)
    return {
        "ordinary": normal(80, 512),
        "hard": hard_weight(),
        "grid points": grid_points,
        "nearly constant": constant,
        "all sizes": normal(48, 512, std=1.0) * 10 ** (12 * normal(48, 512, seed=2, std=1.0)).clamp(-14, 14),
        "denormal": normal(24, 512, std=1e-39),
        "float16": normal(24, 512).half().float(),
        "few values": normal(24, 512, std=1.0).sign() * 0.25,
    }


def same(first: StoredBlocks, second: StoredBlocks) -> bool:
    # 0 and -0 stand for one value, and are equal here.
    return all(
        bool(((mine == real) | (mine.isnan() & real.isnan())).all())
        for mine, real in ((first.codes, second.codes), (first.scale, second.scale), (first.offset, second.offset))
    )


@pytest.mark.parametrize("kind", difficult())
@pytest.mark.parametrize("name", SEARCHED)
def test_stores_what_ggml_stores(name: str, kind: str) -> None:
    weight, block_type = difficult()[kind], BLOCK_TYPES[name]
    assert same(quantize(block_type, weight), block_type.read(load_library().quantize(block_type, weight)))


@pytest.mark.parametrize("kind", difficult())
@pytest.mark.parametrize("name", WEIGHED)
def test_with_an_importance_matrix_too(name: str, kind: str) -> None:
    weight, block_type = difficult()[kind], BLOCK_TYPES[name]
    importance = normal(512, seed=3, std=1.0).abs() ** 3
    real = block_type.read(load_library().quantize(block_type, weight, importance))
    assert same(quantize(block_type, weight, importance), real)


def test_rows_that_fill_no_group_of_lanes() -> None:
    weight, block_type = normal(3, 256), BLOCK_TYPES["Q6_K"]
    assert same(quantize(block_type, weight), block_type.read(load_library().quantize(block_type, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_compiled_kernels_do_what_torch_does(name: str, dtype: torch.dtype) -> None:
    weight, outcomes = hard_weight()[:, :256].contiguous().to(dtype), []
    for kernels in (None, load_kernels()):
        grid = gguf_grid(name)
        grid.kernels, grid.min_as_planned = kernels, 0.0
        lattice = grid.lattice_of(weight)
        guarded = guard_weight(weight[9:], grid, get_defense("stochastic"), seed=0, name="w")
        outcomes.append((lattice, guarded))
    (torch_lattice, in_torch), (lattice, compiled) = outcomes
    assert torch.equal(lattice.frozen, torch_lattice.frozen)
    torch.testing.assert_close(lattice.coordinate, torch_lattice.coordinate, rtol=0, atol=2e-5)
    assert torch.equal(compiled.weight, in_torch.weight)
    assert compiled.digest == in_torch.digest
    counts = ("num_moved", "num_frozen", "num_as_planned")
    assert [getattr(compiled, n) for n in counts] == [getattr(in_torch, n) for n in counts]
    assert compiled.relative_change == pytest.approx(in_torch.relative_change, rel=1e-4)


class TestJudge:
    def wrong(self, monkeypatch: pytest.MonkeyPatch, row: int) -> CheckedQuantizer:
        """A quantizer whose twin is off by one code in one row of each call."""

        def off(block_type, weight, importance=None):
            stored = quantize(block_type, weight, importance)
            stored.codes.view(len(weight), -1)[min(row, len(weight) - 1), 0] ^= 1
            return stored

        monkeypatch.setattr("qcbguard_plugins.backends.ggml.checked._load_reimplementation", lambda: off)
        return CheckedQuantizer(load_library())

    def test_a_twin_that_differs_is_dropped_and_the_manifest_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        judge, weight = self.wrong(monkeypatch, 0), normal(1, 256)
        assert judge.is_restated(BLOCK_TYPES["Q4_K"])
        real = BLOCK_TYPES["Q4_K"].read(load_library().quantize(BLOCK_TYPES["Q4_K"], weight))
        assert same(judge(BLOCK_TYPES["Q4_K"], weight), real)
        assert not judge.is_restated(BLOCK_TYPES["Q4_K"])
        assert judge.is_restated(BLOCK_TYPES["Q6_K"])
        assert "not used, because it differs: Q4_K" in judge.describe()

    def test_a_tensor_is_done_again_when_its_twin_is_dropped_halfway(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qcbguard_plugins.rounding.searched._WEIGHTS_PER_RUN", 2048)
        weight = normal(256, 512)
        grid = SearchedGrid(BLOCK_TYPES["Q5_K"], self.wrong(monkeypatch, 3))
        guarded = guard_weight(weight, grid, get_defense("stochastic"), seed=0, name="w")
        trusted = SearchedGrid(BLOCK_TYPES["Q5_K"], checked_quantizer(reimplementation=False))
        alone = guard_weight(weight, trusted, get_defense("stochastic"), seed=0, name="w")
        assert not grid.is_restated
        assert guarded.digest == alone.digest
        assert guarded.digest == blocks_digest(trusted.stored(guarded.weight), trusted.block_type, 256)

    def test_without_numba_the_library_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qcbguard_plugins.backends.ggml.checked._load_reimplementation", lambda: None)
        judge = CheckedQuantizer(load_library())
        real = BLOCK_TYPES["Q4_K"].read(load_library().quantize(BLOCK_TYPES["Q4_K"], normal(4, 256)))
        assert same(judge(BLOCK_TYPES["Q4_K"], normal(4, 256)), real)
        assert judge.describe() == "none: numba is not installed"


def test_a_grid_without_kernels_needs_no_numba() -> None:
    grids: list[GgmlGrid] = [FormulaGrid(BLOCK_TYPES["Q4_0"]), SearchedGrid(BLOCK_TYPES["Q4_K"], checked_quantizer())]
    for grid in grids:
        guarded = guard_weight(normal(8, 256), grid, get_defense("stochastic"), seed=0, name="w")
        assert torch.equal(grid.quantize(guarded.weight), guarded.codes)


# One over a denormal scale is infinite, and what ggml's formulas make of that no language defines.
@pytest.mark.parametrize("kind", sorted(difficult().keys() - {"denormal"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, block_type in BLOCK_TYPES.items() if not block_type.searched])
def test_one_pass_gives_the_bits_of_torch(name: str, dtype: torch.dtype, kind: str) -> None:
    weight = difficult()[kind].to(dtype)
    outcomes: list[GuardedWeight | str] = []
    for kernels in (load_kernels(), None):
        try:
            grid = FormulaGrid(BLOCK_TYPES[name], dtype, kernels)
            outcomes.append(guard_weight(weight, grid, get_defense("stochastic"), seed=1, name="w"))
        except UnguardableError as error:
            outcomes.append(str(error))
    one, other = outcomes
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert torch.equal(one.weight.view(torch.uint8), other.weight.view(torch.uint8))
    assert torch.equal(one.codes, other.codes)
    assert (one.num_moved, one.num_frozen, one.num_as_planned) == (
        other.num_moved,
        other.num_frozen,
        other.num_as_planned,
    )
    assert one.digest == other.digest
    assert one.relative_change == pytest.approx(other.relative_change, rel=1e-4, abs=1e-12)
