"""Whatever the weight: the real quantizer stores what was planned, with room to spare."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, reject, settings
from scipy.stats import binom
from torch import Tensor

from qcbguard_plugins.backends.bitsandbytes.stock import stock_codes
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import (
    Defense,
    FlipGuard,
    Noise,
    QVec,
    Stochastic,
    WholeModelDefense,
    available_defenses,
    get_defense,
)
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids import CodebookGrid, cut_blocks
from qcbguard_plugins.rounding.guard_weight import guard_weight
from qcbguard_plugins.rounding.guarded_weight import GuardedWeight

FORMATS = ["nf4", "fp4", "nf4-b128", "fp4-b32", "int8"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every method of single weights, with what keeps it short; and other settings of some.
_SHORT: dict[str, dict[str, int]] = {"efrap": {"steps": 8}}
DEFENSES: list[Defense] = [
    get_defense(name, **_SHORT.get(name, {}))
    for name, cls in sorted(available_defenses().items())
    if not issubclass(cls, WholeModelDefense)
] + [FlipGuard(0.5), QVec(1.0), Noise(0.5)]
# Below this the float16 that int8 reads cannot hold 256 levels.
_SMALLEST_INT8_ROW = 2.0**-13

weights = st.builds(
    lambda rows, columns, seed, log_scale, spread, dtype: _weight(rows, columns, seed, log_scale, spread).to(dtype),
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    seed=st.integers(0, 2**32),
    log_scale=st.integers(-9, 6),
    spread=st.floats(0.0, 3.0),
    dtype=st.sampled_from(DTYPES),
)


def _weight(rows: int, columns: int, seed: int, log_scale: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2.0**log_scale
    # Rows of very different size, as trained models have.
    return weight * torch.exp(spread * torch.randn(rows, 1, generator=generator)).clamp(1e-2, 1e2)


def _hessian(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(columns + 8, columns, generator=generator)
    return inputs.T @ inputs


def _guard(weight: Tensor, name: str, defense: Defense, seed: int, hessian: Tensor | None = None) -> GuardedWeight:
    """Guard an example, or drop it where int8's float16 really cannot hold 256 levels in its smallest rows."""
    if name == "int8":
        read = weight.half().double()
        largest = read.abs().amax(dim=1, keepdim=True)
        held_by_none = torch.where((largest < _SMALLEST_INT8_ROW) & (read.abs() < largest), read, 0)
        if held_by_none.square().sum() > 1e-6 * read.square().sum():
            with pytest.raises(UnguardableError, match="energy lies in blocks so small"):
                guard_weight(weight, get_grid(name), defense, seed=seed, name="w", hessian=hessian)
            reject()
    return guard_weight(weight, get_grid(name), defense, seed=seed, name="w", hessian=hessian)


@settings(max_examples=120, deadline=None)
@given(weight=weights, name=st.sampled_from(FORMATS), defense=st.sampled_from(DEFENSES), seed=st.integers(0, 2**63))
def test_the_quantizer_stores_the_plan(weight: Tensor, name: str, defense: Defense, seed: int) -> None:
    before = weight.clone()
    guarded = _guard(weight, name, defense, seed, _hessian(weight.shape[1]))
    assert torch.equal(weight, before)
    assert guarded.weight.dtype == weight.dtype
    assert guarded.weight.shape == weight.shape
    assert torch.equal(stock_codes(guarded.weight, get_grid(name)), guarded.codes)


@settings(max_examples=60, deadline=None)
@given(weight=weights, name=st.sampled_from(["nf4", "fp4"]), seed=st.integers(0, 2**63))
def test_four_bit_plans_survive_a_load_in_another_dtype(weight: Tensor, name: str, seed: int) -> None:
    guarded = _guard(weight, name, Stochastic(), seed)
    for dtype in DTYPES:
        assert torch.equal(stock_codes(guarded.weight.to(dtype), get_grid(name)), guarded.codes), dtype


@settings(max_examples=60, deadline=None)
@given(weight=weights, name=st.sampled_from(["nf4", "fp4", "int8"]), seed=st.integers(0, 2**63))
def test_no_weight_is_left_at_a_threshold(weight: Tensor, name: str, seed: int) -> None:
    """Every weight keeps 1e-6 of its block's scale from a threshold: kernels that differ by an ulp agree.

    Rows that are too small for int8 are stored as they came.
    """
    grid = get_grid(name)
    guarded = _guard(weight, name, Stochastic(), seed)
    blocks = cut_blocks(grid.read(guarded.weight), grid.block_size_of((weight.shape[0], weight.shape[1])))
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    levels = grid.levels if isinstance(grid, CodebookGrid) else grid.levels / 127
    thresholds = (levels[:-1] + levels[1:]) / 2
    distance = (scaled[..., None] - thresholds).abs().amin(dim=-1)
    placed = blocks.abs().amax(dim=1) >= (_SMALLEST_INT8_ROW if name == "int8" else 0.0)
    assert (distance[placed] > 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(weight=weights, name=st.sampled_from(FORMATS), seed=st.integers(0, 2**63))
def test_scales_and_frozen_weights_do_not_move(weight: Tensor, name: str, seed: int) -> None:
    grid = get_grid(name)
    before = grid.lattice_of(weight)
    after = grid.lattice_of(_guard(weight, name, Stochastic(), seed).weight)
    assert torch.equal(before.scale, after.scale)
    assert torch.equal(before.blocks[before.frozen], after.blocks[before.frozen])


@settings(max_examples=40, deadline=None)
@given(weight=weights, name=st.sampled_from(FORMATS), seed=st.integers(0, 2**63))
def test_guarding_twice_changes_nothing_more(weight: Tensor, name: str, seed: int) -> None:
    """Grid points have nothing left to round: the guarded model is its own quantized model.

    A stored grid point lies a rounding error of its dtype beside the exact one, and moves with that chance.
    """
    once = _guard(weight, name, Stochastic(), seed)
    twice = guard_weight(once.weight, get_grid(name), Stochastic(), seed=seed + 1, name="w")
    chance = 0.25 if name == "int8" else 1e-5 if weight.dtype == torch.float32 else 0.05
    assert int((twice.codes != once.codes).sum()) <= binom.isf(1e-9, weight.numel(), chance)


@pytest.mark.parametrize("name", FORMATS)
def test_neither_runs_nor_workers_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(60, 192, 0, -5, 1.0)
    monkeypatch.setattr("qcbguard_plugins.rounding.guard_weight._WEIGHTS_PER_SEGMENT", 4096)
    before = torch.get_num_threads()
    results = []
    for threads, size in [(1, 1 << 15), (1, 512), (4, 512)]:
        torch.set_num_threads(threads)
        monkeypatch.setattr("qcbguard_plugins.rounding.guard_weight._WEIGHTS_PER_RUN", size)
        results.append(guard_weight(weight, get_grid(name), Stochastic(), seed=3, name="w"))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].weight, other.weight)
        assert (results[0].num_moved, results[0].num_frozen) == (other.num_moved, other.num_frozen)


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    weight = torch.randn(8, 64)
    weight[3, 5] = bad
    with pytest.raises(UnguardableError, match=r"layer\.weight.*NaN or infinity"):
        guard_weight(weight, get_grid(name), Stochastic(), seed=0, name="layer.weight")


def test_an_overflow_of_int8s_float16_cast_is_refused() -> None:
    with pytest.raises(UnguardableError, match="as int8 reads it"):
        guard_weight(torch.full((4, 64), 7e4), get_grid("int8"), Stochastic(), seed=0, name="w")


def test_an_attack_hidden_in_tiny_weights_is_not_waved_through() -> None:
    """Weights scaled down to float16 subnormals leave no room between levels; that is an error and not a silence."""
    weight = (torch.randn(64, 64) * 1e-7).half()
    with pytest.raises(UnguardableError, match="energy lies in blocks so small"):
        guard_weight(weight, get_grid("fp4"), Stochastic(), seed=0, name="w")


def test_a_few_dead_rows_do_not_stop_the_guard() -> None:
    weight = torch.randn(64, 64).half()
    weight[5] = 0
    weight[6] = weight[6] * 1e-7
    guarded = guard_weight(weight, get_grid("nf4"), Stochastic(), seed=0, name="w")
    assert torch.equal(guarded.weight[5:7], weight[5:7])
    assert torch.equal(stock_codes(guarded.weight, get_grid("nf4")), guarded.codes)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.randn(64), "not a non-empty matrix"),
        (torch.randn(0, 64), "not a non-empty matrix"),
        (torch.randn(8, 64, dtype=torch.float64), "its dtype is float64"),
        (torch.ones(8, 64, dtype=torch.int8), "its dtype is int8"),
    ],
)
def test_what_is_no_weight_is_refused(weight: Tensor, reason: str) -> None:
    with pytest.raises(UnguardableError, match=reason):
        guard_weight(weight, get_grid("nf4"), Stochastic(), seed=0, name="w")
