"""The compiled forms for bitsandbytes' grids: bits of the torch code, and codes of the real quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from qcbguard_plugins._kernels import bitsandbytes
from qcbguard_plugins.backends.bitsandbytes import checked as judge
from qcbguard_plugins.backends.bitsandbytes.checked import CheckedCodes
from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import Stochastic
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.grids.codebook import BLOCK_SIZES
from qcbguard_plugins.rounding import guard_weight as rounding
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight
from tests.parity.test_bitsandbytes_grids import DTYPES, FORMATS, KINDS, SHAPES, weights_of


def guard(weight: Tensor, name: str, *, overwrite: bool = False) -> GuardedWeight:
    return rounding.guard_weight(weight.clone(), get_grid(name), Stochastic(), seed=3, name="w", overwrite=overwrite)


def outcome(weight: Tensor, name: str) -> GuardedWeight | str:
    try:
        return guard(weight, name)
    except UnguardableError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "nf4-b32", "fp4-b4096"])
def test_one_pass_gives_the_bits_of_torch(
    name: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [weights_of(kind, shape).to(dtype) for shape in SHAPES]
    compiled = [outcome(weight, name) for weight in weights]
    monkeypatch.setattr(rounding, "load_kernels", lambda: None)
    monkeypatch.setattr(rounding, "_WEIGHTS_PER_SEGMENT", 1 << 12)
    for weight, ours in zip(weights, compiled, strict=True):
        plain = outcome(weight, name)
        if isinstance(ours, str) or isinstance(plain, str):
            assert ours == plain
            continue
        assert torch.equal(ours.weight.view(torch.uint8), plain.weight.view(torch.uint8))
        assert torch.equal(ours.codes, plain.codes)
        assert (ours.num_moved, ours.num_frozen, ours.digest) == (plain.num_moved, plain.num_frozen, plain.digest)
        assert ours.relative_change == pytest.approx(plain.relative_change, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_may_be_overwritten(name: str, dtype: torch.dtype) -> None:
    weight = weights_of("random", (33, 97)).to(dtype)
    apart, over = guard(weight, name), guard(weight, name, overwrite=True)
    assert torch.equal(apart.weight, over.weight)
    assert (apart.relative_change, apart.digest) == (over.relative_change, over.digest)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    weight = weights_of("random", (33, 97))
    weight[20, 3] = bad
    with pytest.raises(UnguardableError, match="NaN or infinity"):
        guard(weight, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_the_twin_stores_what_the_grid_says(name: str, dtype: torch.dtype, kind: str) -> None:
    """The grid is held to the real quantizer in test_bitsandbytes_grids."""
    for shape in SHAPES:
        weight = weights_of(kind, shape).to(dtype)
        assert torch.equal(bitsandbytes.quantize(weight, get_grid(name)), get_grid(name).quantize(weight)), shape


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_twin_knows_every_block_size(name: str, block_size: int) -> None:
    weight, grid = weights_of("random", (40, 130)), get_grid(f"{name}-b{block_size}")
    assert torch.equal(bitsandbytes.quantize(weight, grid), grid.quantize(weight))


class TestJudge:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("name", FORMATS)
    def test_it_says_what_bitsandbytes_stores(self, name: str, shape: tuple[int, int]) -> None:
        checked, weight = CheckedCodes(), weights_of("random", shape)
        assert torch.equal(checked(weight, get_grid(name)), stock_codes(weight, get_grid(name)))
        assert not checked.differing

    @pytest.mark.parametrize("name", FORMATS)
    def test_a_twin_that_differs_is_found_out_and_no_longer_asked(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight, grid, calls = weights_of("random", (64, 256)), get_grid(name), []

        def wrong(weight: Tensor, grid: Grid) -> Tensor:
            calls.append(grid.name)
            return grid.quantize(weight) ^ 1

        monkeypatch.setattr(bitsandbytes, "quantize", wrong)
        checked = CheckedCodes()
        for _ in range(2):
            assert torch.equal(checked(weight, grid), stock_codes(weight, get_grid(name)))
        assert calls == [name]
        assert f"not used, because it differs: {name}" in checked.describe()

    def test_a_difference_in_the_short_last_block_is_always_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, grid = weights_of("random", (1, 64 * 200 + 7)), get_grid("nf4")
        codes = grid.quantize(weight)
        codes[0, -1] ^= 1
        monkeypatch.setattr(bitsandbytes, "quantize", lambda weight, grid: codes)
        checked = CheckedCodes()
        assert torch.equal(checked(weight, grid), stock_codes(weight, get_grid("nf4")))
        assert checked.differing == {"nf4"}

    def test_without_numba_bitsandbytes_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(judge, "load_kernels", lambda: None)
        checked, weight = CheckedCodes(), weights_of("random", (33, 97))
        assert torch.equal(checked(weight, get_grid("nf4")), stock_codes(weight, get_grid("nf4")))
        assert checked.describe() == "none: numba is not installed"
