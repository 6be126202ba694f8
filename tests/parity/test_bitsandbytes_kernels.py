"""The compiled forms for bitsandbytes' grids: bits of the torch code, and codes of the real quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from qcbguard_plugins import rounding
from qcbguard_plugins.defenses import Stochastic
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids import BLOCK_SIZES, get_grid
from qcbguard_plugins.guarded_weight import GuardedWeight
from qcbguard_plugins.kernels import bitsandbytes
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
