"""The dither's width, chosen by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import ChoiceContext, Feedback, rng_for
from qcbguard_plugins.defenses.dither_width import BUDGET, WIDTHS, choose_width, retained_share
from qcbguard_plugins.grids import Lattice

SHAPE = (96, 128)


def correlated_hessian() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(SHAPE[1], SHAPE[1], generator=generator) * torch.logspace(0, -2, SHAPE[1])
    inputs = torch.randn(600, SHAPE[1], generator=generator) @ mixing.T
    return inputs.T @ inputs


def lattice_of(name: str = "nf4") -> Lattice:
    return get_grid(name).lattice_of(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def auto_width(
    lattice: Lattice, hessian: Tensor, *, looks_attacked: bool = False
) -> tuple[Tensor, dict[str, float | str]]:
    context = ChoiceContext(rng_for(0, "w"), hessian, looks_attacked)
    return Feedback().choose(lattice, context), context.chosen


def plain_error(position: Tensor) -> Tensor:
    return (position > 0.5).float() - position


@pytest.mark.parametrize(("width", "expected"), [(0.25, 3 / 8), (0.5, 0.0), (1e-6, 1.0)])
def test_what_a_dither_keeps_of_plain_rounding(width: float, expected: float) -> None:
    """Integrals over a cell: 0.0104 outside the dither's reach and 0.0208 inside, of an energy of 1/12."""
    position = (torch.arange(100_000) + 0.5) / 100_000
    kept = retained_share(position, plain_error(position), torch.ones_like(position), width)
    assert kept == pytest.approx(expected, abs=1e-3)


def test_a_tightened_box_keeps_all_of_its_error_under_a_narrow_dither() -> None:
    position = torch.cat([torch.linspace(0.01, 0.1, 500), torch.linspace(0.9, 0.99, 500)])
    step = torch.ones_like(position)
    assert retained_share(position, plain_error(position), step, 0.25) == pytest.approx(1.0)
    assert retained_share(position, plain_error(position), step, 0.5) == pytest.approx(0.0, abs=1e-6)


def test_weights_without_a_choice_do_not_count() -> None:
    position, step = torch.tensor([0.5, 0.9]), torch.tensor([1.0, 0.0])
    assert retained_share(position, torch.tensor([0.5, 7.0]), step, 0.5) == 0.0
    assert retained_share(position, torch.zeros(2), step, 0.25) == 0.0


def test_the_widest_affordable_width_is_taken_and_never_less_than_the_floor() -> None:
    retained = [0.375, 0.3, 0.2, 0.1, 0.05, 0.0]
    assert choose_width([1, 2, 3, 4, 5, 6], 3.1 / BUDGET, retained).value == 0.35
    assert choose_width([1, 2, 3, 4, 5, 6], 3.1 / BUDGET, retained).because == "budget"
    assert choose_width([9] * 6, 1.0, retained).value == 0.25
    assert choose_width([9] * 6, 1.0, [0.9, 0.8, 0.7, 0.4, 0.2, 0.0]).value == 0.4
    assert choose_width([9] * 6, 1.0, [0.9, 0.8, 0.7, 0.4, 0.2, 0.0]).because == "floor"
    assert choose_width([9] * 6, 1.0, [1.0] * 6).value == 0.5


def test_an_attack_calls_for_unbiased_rounding() -> None:
    lattice, hessian = lattice_of(), correlated_hessian()
    codes, chosen = auto_width(lattice, hessian, looks_attacked=True)
    assert chosen == {"width": 0.5, "because": "precaution"}
    assert torch.equal(codes, Feedback(width=0.5).choose(lattice, ChoiceContext(rng_for(0, "w"), hessian)))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_a_layer_without_an_attack_stays_closer_than_plain_rounding(name: str) -> None:
    lattice, hessian = lattice_of(name), correlated_hessian()
    codes, chosen = auto_width(lattice, hessian)
    assert chosen["width"] in WIDTHS

    def output_error(codes: Tensor) -> float:
        points = torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(codes))
        error = lattice.matrix(points - lattice.blocks)
        return float(((error @ hessian) * error).sum())

    assert output_error(codes) < output_error(lattice.nearest)


def test_correlated_inputs_afford_more_noise_than_white_ones() -> None:
    lattice = lattice_of()
    _, white = auto_width(lattice, torch.eye(SHAPE[1]))
    _, correlated = auto_width(lattice, correlated_hessian())
    assert white == {"width": 0.25, "because": "floor"}
    assert correlated["width"] > 0.25
    assert correlated["because"] == "budget"


def test_weights_near_grid_points_raise_the_floor() -> None:
    lattice = lattice_of()
    points = lattice.dequantize(lattice.nearest)
    near = torch.where(lattice.frozen, lattice.blocks, points + 0.1 * (lattice.blocks - points))
    _, chosen = auto_width(get_grid("nf4").lattice_of(lattice.matrix(near)), torch.eye(SHAPE[1]))
    assert chosen["width"] >= 0.45


def test_a_fixed_width_chooses_nothing() -> None:
    context = ChoiceContext(rng_for(0, "w"), correlated_hessian())
    Feedback(width=0.25).choose(lattice_of(), context)
    assert context.chosen == {}
    assert not Feedback(width=0.25).weighs_evidence
    assert Feedback().weighs_evidence
