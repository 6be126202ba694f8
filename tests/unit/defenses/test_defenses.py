"""What each method is for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from qcbguard_plugins._util.random import philox_key
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import (
    ChoiceContext,
    Defense,
    Feedback,
    FlipGuard,
    Noise,
    QVec,
    Stochastic,
    feedback,
    get_defense,
    register_defense,
    rng_for,
)
from qcbguard_plugins.defenses.feedback import inverse_hessian_factor
from qcbguard_plugins.errors import CalibrationError, UsageError
from qcbguard_plugins.grids import Lattice

SHAPE = (96, 128)


def lattice_of(name: str = "nf4", seed: int = 0) -> Lattice:
    generator = torch.Generator().manual_seed(seed)
    return get_grid(name).lattice_of(torch.randn(SHAPE, generator=generator))


def context(hessian: Tensor | None = None) -> ChoiceContext:
    return ChoiceContext(rng_for(0, "w"), hessian, key=philox_key(0, "w"))


def inputs(rows: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(SHAPE[1], SHAPE[1], generator=generator) / SHAPE[1] ** 0.5
    return torch.randn(rows, SHAPE[1], generator=generator) @ mixing


def output_error(lattice: Lattice, codes: Tensor) -> float:
    points = torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(codes))
    return float((inputs() @ lattice.matrix(points - lattice.blocks).T).norm())


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """Over many seeds the mean stored weight is the weight, to within its standard error."""
    lattice = lattice_of(name)
    num_seeds = 400
    total = torch.zeros_like(lattice.blocks)
    for seed in range(num_seeds):
        total += lattice.dequantize(
            Stochastic().choose(lattice, ChoiceContext(rng_for(seed, "w"), key=philox_key(seed, "w")))
        )
    step = lattice.dequantize(lattice.lower + 1) - lattice.dequantize(lattice.lower)
    standard_error = step * (lattice.position * (1 - lattice.position) / num_seeds).sqrt()
    z = ((total / num_seeds - lattice.blocks) / standard_error.clamp(min=1e-9))[~lattice.frozen]
    z = z[z.abs() < 50]  # positions within float32 rounding of a level have no spread to speak of
    assert abs(float(z.mean())) < 0.05
    assert 0.9 < float(z.std()) < 1.1


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_flipguard_flips_the_largest_errors_of_each_block(name: str, share: float) -> None:
    lattice = lattice_of(name)
    codes = FlipGuard(share).choose(lattice, context())
    flipped = codes != lattice.nearest
    free = ~lattice.frozen
    error = (lattice.dequantize(lattice.nearest) - lattice.blocks).abs() / lattice.scale
    for block in range(lattice.blocks.shape[0]):
        inside = flipped[block] & free[block]
        kept = ~flipped[block] & free[block]
        assert int(inside.sum()) == min(round(share * flipped.shape[1]), int(free[block].sum()))
        if inside.any() and kept.any():
            assert error[block][inside].min() >= error[block][kept].max() - 1e-5


def test_flipguards_automatic_share_makes_the_new_error_orthogonal_to_the_old_one() -> None:
    """Where weights lie anywhere in their cells, as they do in the many fine ones of INT8."""
    lattice = get_grid("int8").lattice_of(torch.randn(96, 1024, generator=torch.Generator().manual_seed(0)))
    old = lattice.dequantize(lattice.nearest) - lattice.blocks
    new = lattice.dequantize(FlipGuard("auto").choose(lattice, context())) - lattice.blocks
    free = ~lattice.frozen
    assert abs(float((old * new)[free].sum() / old[free].square().sum())) < 0.03


def test_flipguard_takes_the_bracketing_neighbour() -> None:
    """FP4 has a narrow cell beside a wide one: the second nearest level is not the other end of the weight's cell."""
    weight = torch.zeros(1, 64)
    weight[0, :2] = torch.tensor([1.0, 0.089])  # in the cell [0.0052, 0.1667], nearer to 0.1667; then comes 0.0052
    lattice = get_grid("fp4").lattice_of(weight)
    codes = FlipGuard(1 / 64).choose(lattice, context())
    assert lattice.dequantize(codes)[0, 1] == pytest.approx(0.0052083, abs=1e-6)


def test_qvec_flips_where_the_stepped_weight_rounds_otherwise() -> None:
    lattice = lattice_of()
    strength = 0.25
    nearest = lattice.dequantize(lattice.nearest)
    stepped = lattice.blocks - strength * (nearest - lattice.blocks)
    expected = (lattice.grid.coordinate(stepped / lattice.scale) - 0.5).ceil().to(torch.uint8)
    free = ~lattice.frozen
    assert torch.equal(QVec(strength).choose(lattice, context())[free], expected[free])


def test_noise_moves_more_the_more_of_it_there_is() -> None:
    lattice = lattice_of()
    moved = [
        float((Noise(sigma).choose(lattice, context()) != lattice.nearest).float().mean()) for sigma in (0.0, 0.1, 0.3)
    ]
    assert moved[0] == 0
    assert 0.05 < moved[1] < moved[2] < 0.4


def test_feedback_without_dither_on_white_inputs_is_plain_rounding() -> None:
    lattice = lattice_of()
    codes = Feedback(width=0.0).choose(lattice, context(torch.eye(SHAPE[1])))
    assert torch.equal(codes[~lattice.frozen], lattice.nearest[~lattice.frozen])


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_feedback_keeps_the_layers_output(name: str) -> None:
    """With the same unbiased dither, feedback changes the layer's output less than independent rounding does."""
    lattice = lattice_of(name)
    hessian = inputs().T @ inputs()
    alone = output_error(lattice, Stochastic().choose(lattice, context()))
    plain = output_error(lattice, lattice.nearest)
    dithered = output_error(lattice, Feedback().choose(lattice, context(hessian)))
    undithered = output_error(lattice, Feedback(width=0.0).choose(lattice, context(hessian)))
    assert dithered < 0.8 * alone
    assert undithered < 0.8 * plain
    assert undithered < dithered


def test_feedback_equals_the_textbook_recursion() -> None:
    """Batches of columns are bookkeeping: the result is that of one column at a time with the whole inverse."""
    lattice = lattice_of("nf4")
    hessian = inputs().T @ inputs()
    codes = lattice.matrix(Feedback(width=0.0, draws=1).choose(lattice, context(hessian)))
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    damped = hessian.double() + Feedback().damp_percent * hessian.diagonal().mean() * torch.eye(SHAPE[1])
    codes = codes[:, order]
    weight = lattice.matrix(lattice.blocks).double()[:, order]
    original = weight.clone()
    scale = lattice.matrix(lattice.scale).double()[:, order]
    frozen = lattice.matrix(lattice.frozen)[:, order]
    agree = 0
    for j in range(SHAPE[1]):
        inverse = torch.linalg.inv(damped[j:, j:])
        coordinate = lattice.grid.coordinate((weight[:, j] / scale[:, j]).float())
        level = (coordinate - 0.5).ceil().to(torch.uint8)
        agree += int((level == codes[:, j]).sum() + (frozen[:, j] & (level != codes[:, j])).sum())
        rounded = torch.where(frozen[:, j], original[:, j], lattice.grid.level_values(level).double() * scale[:, j])
        error = (weight[:, j] - rounded) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
    assert agree / codes.numel() > 0.999


def test_more_draws_stay_nearer_to_the_layers_output() -> None:
    lattice = lattice_of("nf4")
    hessian = inputs().T @ inputs()
    errors = [output_error(lattice, Feedback(draws=draws).choose(lattice, context(hessian))) for draws in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_mean_error_is_zero_whatever_the_inputs_are(name: str) -> None:
    """Also where they do not reach, and along plain rounding's own error, which is what an attacker needs."""
    lattice = lattice_of(name)
    reached = inputs()
    reached[:, SHAPE[1] // 2 :] = 0
    hessian = reached.T @ reached
    blind = torch.zeros(SHAPE[1])
    blind[SHAPE[1] // 2 :] = 1.0
    plain = (lattice.dequantize(lattice.nearest) - lattice.blocks).masked_fill(lattice.frozen, 0.0)
    drifts, shares = [], []
    for seed in range(60):
        codes = Feedback().choose(lattice, ChoiceContext(rng_for(seed, "w"), hessian))
        error = torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(codes)) - lattice.blocks
        drifts.append(float((lattice.matrix(error) @ blind).sum()))
        shares.append(float((error * plain).sum() / plain.square().sum()))
    for found in (drifts, shares):
        assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    assert abs(np.mean(shares)) < 0.01


def test_nothing_comes_back_of_a_box_that_was_tightened() -> None:
    """Weights within a tenth of a step of their levels, where few draws round away from plain rounding's choice."""
    lattice = lattice_of("nf4")
    points = lattice.dequantize(lattice.nearest)
    near = torch.where(lattice.frozen, lattice.blocks, points + 0.2 * (lattice.blocks - points))
    lattice = get_grid("nf4").lattice_of(lattice.matrix(near))
    hessian = inputs().T @ inputs()
    plain = (lattice.dequantize(lattice.nearest) - lattice.blocks).masked_fill(lattice.frozen, 0.0)
    shares = []
    for seed in range(150):
        codes = Feedback().choose(lattice, ChoiceContext(rng_for(seed, "w"), hessian))
        error = torch.where(lattice.frozen, lattice.blocks, lattice.dequantize(codes)) - lattice.blocks
        shares.append(float((error * plain).sum() / plain.square().sum()))
    assert abs(np.mean(shares)) < 3 * np.std(shares) / len(shares) ** 0.5 < 0.04


@pytest.mark.parametrize("num_draws", [1, 3, 8])
def test_draws_round_up_as_much_together_as_alone(num_draws: int) -> None:
    """Over all random numbers, in steps of their cells, and the highest first."""
    generator = torch.Generator().manual_seed(0)
    position = torch.rand(num_draws, 50, generator=generator)
    cell = 0.5 + torch.rand(num_draws, 50, generator=generator)
    position[:, 0], position[:, 1], cell[:, 1] = 0.3, 0.0, 1.0
    numbers = (torch.arange(1000) + 0.5) / 1000
    up = torch.stack([feedback._goes_up(position, cell, torch.full((50,), float(u)), gain=1.0) for u in numbers])
    mean = (up * cell).mean(dim=0).sum(dim=0)
    torch.testing.assert_close(mean, (position * cell).sum(dim=0), rtol=0, atol=5e-3)
    ordered = up.gather(1, position.argsort(dim=0, descending=True, stable=True).expand_as(up)).int()
    assert (ordered.diff(dim=1) <= 0)[:, :, 2:].all()
    assert not up[:, :, 1].any()


def test_feedback_without_inputs_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="needs the inputs"):
        Feedback().choose(lattice_of(), context())


def test_a_singular_hessian_is_damped() -> None:
    few = inputs(4)
    factor, damping = inverse_hessian_factor(few.T @ few, 0.01)
    assert damping == 0.01
    assert torch.isfinite(factor).all()
    assert torch.equal(factor, factor.triu())


def test_a_damping_that_was_raised_is_reported() -> None:
    hessian = torch.eye(128)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05
    chosen: dict[str, float | str] = {}
    Feedback(width=0.5, damp_percent=0.01).choose(lattice_of(), ChoiceContext(rng_for(0, "w"), hessian, chosen=chosen))
    assert chosen == {"damp_percent": 0.1}


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.zeros(8, 8), "no calibration input"),
        (torch.full((8, 8), float("nan")), "NaN or infinity"),
        (-torch.eye(8) + 2 * torch.ones(8, 8), "cannot be factorized"),
    ],
)
def test_a_hessian_that_is_none_is_refused(hessian: Tensor, reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        inverse_hessian_factor(hessian, 1e-4)


def test_draws_depend_on_seed_and_name_alone() -> None:
    def draw(seed: int, name: str) -> np.ndarray:
        return rng_for(seed, name).random(4)

    assert np.array_equal(draw(1, "a"), draw(1, "a"))
    assert not np.array_equal(draw(1, "a"), draw(2, "a"))
    assert not np.array_equal(draw(1, "a"), draw(1, "b"))


def test_draws_are_the_same_in_one_piece_and_in_two() -> None:
    whole = context().uniform(torch.empty(10))
    pieces = context()
    assert torch.equal(whole, torch.cat([pieces.uniform(torch.empty(3)), pieces.uniform(torch.empty(7))]))


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_defense("feedback", "another")(Stochastic)


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("feedbck", {}, "unknown method"),
        ("feedback", {"widht": 0.1}, "no parameter widht"),
        ("feedback", {"width": 0.6}, "between 0 and 0.5"),
        ("feedback", {"width": float("nan")}, "between 0 and 0.5"),
        ("feedback", {"damp_percent": 0}, "damp_percent"),
        ("feedback", {"draws": 0}, "draws"),
        ("feedback", {"draws": 2.5}, "whole number"),
        ("flipguard", {"share": -0.1}, "share"),
        ("flipguard", {"share": "most"}, "share must be auto"),
        ("feedback", {"width": "wide"}, "width must be auto"),
        ("qvec", {"strength": "a"}, "strength"),
        ("noise", {"sigma": 3}, "sigma"),
    ],
)
def test_a_wrong_name_or_parameter_is_refused(name: str, parameters: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        get_defense(name, **parameters)


@pytest.mark.parametrize(
    "defense",
    [Feedback(), FlipGuard(), FlipGuard(0.2), FlipGuard("auto"), Feedback(width=0.25), QVec(), Noise(), Stochastic()],
)
def test_a_defense_is_plain_data(defense: Defense) -> None:
    described = json.loads(json.dumps(defense.parameters()))
    assert get_defense(defense.name, **described) == defense
    with pytest.raises(dataclasses.FrozenInstanceError):
        defense.width = 0.1


def test_a_grid_point_stays_whatever_is_drawn() -> None:
    """The largest draw below one, taken off a coordinate of 128, is 127 in float32."""

    class LargestDraw(ChoiceContext):
        def draws(self, like: Tensor) -> Tensor:
            return torch.full_like(like, 1 - 2.0**-24)

    weight = torch.zeros(2, 32)
    weight[:, 0] = 0.027
    lattice = get_grid("gptq-w8g32").lattice_of(weight)
    codes = Stochastic().choose(lattice, LargestDraw(rng_for(0, "w")))
    assert torch.equal(codes[:, 1:], torch.full((2, 31), 128, dtype=torch.uint8))
