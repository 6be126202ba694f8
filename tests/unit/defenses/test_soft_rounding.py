"""Learned rounding on single weights: the formulas, by hand, and EFRAP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import BACKENDS, get_grid
from qcbguard_plugins.defenses import ChoiceContext, Efrap, rng_for
from qcbguard_plugins.defenses.soft_rounding import SoftRounding
from qcbguard_plugins.errors import CalibrationError, UsageError
from qcbguard_plugins.grids import Lattice


def lattice_of(name: str = "nf4") -> Lattice:
    return get_grid(name).lattice_of(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)))


def lattice_at(positions: list[float]) -> Lattice:
    """INT8 weights of one row, a holder of 127 first, each the given number of steps above a level: step 1."""
    row = torch.tensor([[127.0, *(10 * (i + 1) + p for i, p in enumerate(positions))]])
    return get_grid("int8").lattice_of(row)


@pytest.mark.parametrize("name", BACKENDS["bitsandbytes"].formats)
@pytest.mark.parametrize("band", [None, 0.2, 0.5])
def test_the_start_is_the_weight(name: str, band: float | None) -> None:
    lattice = lattice_of(name)
    rounding = SoftRounding(lattice, band=band)
    step = (lattice.dequantize(lattice.lower + 1) - lattice.dequantize(lattice.lower)).max()
    assert (rounding.weight() - lattice.matrix(lattice.blocks)).abs().max() < 3e-4 * step
    assert torch.equal(rounding.weight()[lattice.matrix(lattice.frozen)], lattice.blocks[lattice.frozen])
    free = ~lattice.matrix(lattice.frozen)
    assert torch.equal(rounding.up()[free], lattice.matrix(lattice.upper_is_nearest)[free])


@pytest.mark.parametrize("band", [None, 0.2, 0.5])
def test_a_hardened_weight_starts_as_plain_rounding_and_has_gradients(band: float | None) -> None:
    lattice = lattice_of()
    rounding = SoftRounding(lattice, band=band, harden=True)
    plain = torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(lattice.nearest))
    torch.testing.assert_close(rounding.weight(), lattice.matrix(plain), atol=1e-6, rtol=0)
    rounding.weight().sum().backward()
    assert rounding.alpha.grad is not None
    assert float(rounding.alpha.grad.abs().sum()) > 0


def test_the_reversal_loss_by_hand() -> None:
    """Positions 0.25 and 0.625: errors of 0.25 and 0.375 steps, pulled to the upper and to the lower neighbour."""
    rounding = SoftRounding(lattice_at([0.25, 0.625]))
    expected = 0.25 * -math.log(0.25) + 0.375 * -math.log(1 - 0.625)
    assert rounding.reversal_loss().item() == pytest.approx(expected, rel=2e-3)


def test_the_distance_loss_by_hand() -> None:
    """At h = 0.5 everywhere the weights have moved by 0.25 and -0.125 steps."""
    rounding = SoftRounding(lattice_at([0.25, 0.625]))
    with torch.no_grad():
        rounding.alpha.zero_()
    expected = (1 - 0.25) * 0.25**2 + (1 - 0.375) * 0.125**2
    assert rounding.distance_loss().item() == pytest.approx(expected, rel=2e-3)


def test_softness_by_hand() -> None:
    rounding = SoftRounding(lattice_at([0.25, 0.625]))
    assert rounding.softness().item() == pytest.approx((1 - 0.5**2) + (1 - 0.25**2), rel=2e-3)


def test_only_a_band_is_variable() -> None:
    lattice = lattice_of()
    rounding = SoftRounding(lattice, band=0.1)
    inside = ((lattice.position - 0.5).abs() <= 0.1) & ~lattice.frozen
    assert rounding.alpha.numel() == int(inside.sum())
    with torch.no_grad():
        rounding.alpha.neg_()
    flipped = lattice.from_matrix(rounding.up()) != lattice.upper_is_nearest
    assert torch.equal(flipped, inside & (lattice.position != 0.5))


def test_neighbours_bracket_the_weight_on_an_uneven_grid() -> None:
    """FP4 has a narrow cell beside a wide one: a weight moves to the other end of its own cell."""
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([1.0, 0.089])
    rounding = SoftRounding(get_grid("fp4").lattice_of(weight))
    with torch.no_grad():
        rounding.alpha.fill_(-50.0)
    assert rounding.weight()[0, 1].item() == pytest.approx(0.0052083, abs=1e-6)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_scales_do_not_move_wherever_the_variables_go(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    lattice = lattice_of(name)
    before = bnb.quantize_4bit(lattice.matrix(lattice.blocks).contiguous(), quant_type=name)[1].absmax
    rounding = SoftRounding(lattice)
    for alpha in (-50.0, 0.0, 50.0):
        with torch.no_grad():
            rounding.alpha.fill_(alpha)
            after = bnb.quantize_4bit(rounding.weight().contiguous(), quant_type=name)[1].absmax
        assert torch.equal(before, after)


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(128, 128, generator=generator) * torch.logspace(0, -2, 128)
    return torch.randn(400, 128, generator=generator) @ mixing.T


def test_efrap_keeps_the_layers_output() -> None:
    lattice, hessian = lattice_of(), inputs().T @ inputs()

    def output_error(codes: Tensor) -> float:
        points = torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(codes))
        return float((inputs() @ lattice.matrix(points - lattice.blocks).T).norm())

    codes = Efrap(learning_rate=0.1, steps=500, reconstruction=30.0, penalty=1.0).choose(
        lattice, ChoiceContext(rng_for(0, "w"), hessian)
    )
    assert output_error(codes) < 0.8 * output_error(lattice.nearest)


def test_efrap_without_an_output_to_keep_reverses_plain_rounding() -> None:
    lattice = lattice_of()
    efrap = Efrap(learning_rate=0.2, steps=200, penalty=0.0)
    codes = efrap.choose(lattice, ChoiceContext(rng_for(0, "w"), torch.zeros(128, 128)))
    free = ~lattice.frozen & (lattice.position > 1e-3) & (lattice.position < 1 - 1e-3)
    assert ((codes != lattice.nearest) & free).sum() > 0.99 * free.sum()


def test_efrap_refuses_what_is_no_hessian() -> None:
    with pytest.raises(CalibrationError, match="none were gathered"):
        Efrap().choose(lattice_of(), ChoiceContext(rng_for(0, "w")))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        Efrap().choose(lattice_of(), ChoiceContext(rng_for(0, "w"), torch.full((128, 128), float("nan"))))


def test_efrap_travels_as_far_as_in_its_paper() -> None:
    assert Efrap(steps=10_000).rate == pytest.approx(1e-3)
    assert Efrap(steps=500).rate * 500 == pytest.approx(10.0)
    assert Efrap(learning_rate=0.3).rate == 0.3
    with pytest.raises(UsageError, match="learning_rate"):
        Efrap(learning_rate=0.0)


def test_efrap_names_the_step_at_which_its_loss_is_no_number() -> None:
    """Moments that no inputs have: far apart from each other's scale, they overflow where their mean is set to 1."""
    hessian = torch.full((128, 128), 1e30).fill_diagonal_(1e-30)
    with pytest.raises(CalibrationError, match="at step 1") as error:
        Efrap().choose(lattice_of(), ChoiceContext(rng_for(0, "w"), hessian))
    assert "learning_rate" in str(error.value)
