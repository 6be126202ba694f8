"""QuantGuard on a small model: its terms, its stops, and that the model is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import ChoiceContext, ModelWeight, QuantGuard, get_defense, rng_for
from qcbguard_plugins.defenses.learned_rounding import EarlyStop
from qcbguard_plugins.defenses.soft_rounding import SoftRounding
from qcbguard_plugins.errors import CalibrationError, UsageError
from tests.conftest import SHAPES, VOCAB_SIZE

SHORT = QuantGuard(steps=4, batch_size=2, learning_rate=0.05)


@pytest.fixture(scope="module")
def model() -> Any:
    config, _, _ = SHAPES["llama-fp32"]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens() -> Tensor:
    return torch.randint(VOCAB_SIZE, (6, 24), generator=torch.Generator().manual_seed(0))


def targets(model: Any, format: str = "nf4") -> Iterator[ModelWeight]:
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            yield ModelWeight(name, (module,), False, get_grid(format).lattice_of(module.weight.data))


def learn(method: QuantGuard, model: Any, seed: int = 0, format: str = "nf4") -> dict[str, Tensor]:
    return method.learn(model, targets(model, format), tokens(), seed)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("harden", [False, True])
def test_it_moves_weights_and_leaves_the_model_alone(harden: bool, format: str, model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learned = learn(dataclasses.replace(SHORT, harden=harden), model, format=format)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    moved = [
        (learned[target.name] != target.lattice.matrix(target.lattice.upper_is_nearest)).float().mean().item()
        for target in targets(model, format)
    ]
    assert all(0 < share < 0.5 for share in moved)


def test_it_is_deterministic_under_its_seed(model: Any) -> None:
    method = dataclasses.replace(SHORT, lambda1=0.0, lambda2=0.0)
    assert same(learn(method, model, seed=1), learn(method, model, seed=1))
    assert not same(learn(method, model, seed=1), learn(method, model, seed=2))


@pytest.mark.parametrize("harden", [False, True])
def test_a_band_that_covers_everything_changes_nothing(harden: bool, model: Any) -> None:
    dense = learn(dataclasses.replace(SHORT, harden=harden), model)
    sparse = learn(dataclasses.replace(SHORT, harden=harden, band=0.5), model)
    for target in targets(model):
        free = ~target.lattice.matrix(target.lattice.frozen)
        differing = (dense[target.name] != sparse[target.name]) & free
        assert differing.float().mean() < 1e-3  # the two add up gradients in different orders


def test_weights_outside_the_band_stay(model: Any) -> None:
    learned = learn(dataclasses.replace(SHORT, band=0.1), model)
    for target in targets(model):
        outside = target.lattice.matrix((target.lattice.position - 0.5).abs() > 0.1)
        plain = target.lattice.matrix(target.lattice.upper_is_nearest)
        assert torch.equal(learned[target.name][outside], plain[outside])


def test_checkpointing_changes_nothing(model: Any) -> None:
    assert same(learn(SHORT, model), learn(dataclasses.replace(SHORT, gradient_checkpointing=True), model))
    assert not model.is_gradient_checkpointing


def test_passes_of_one_sequence_add_up_to_a_batch(model: Any) -> None:
    """The paper's schedule takes its samples one by one."""
    together = dataclasses.replace(SHORT, batch_size=6)
    one_by_one = dataclasses.replace(SHORT, batch_size=1, accumulation=6)
    batch, singles = learn(together, model), learn(one_by_one, model)
    agreement = torch.cat([(batch[name] == singles[name]).view(-1) for name in batch]).float().mean()
    assert agreement > 0.999  # gradients are added up in another order


def test_a_layer_that_holds_its_weight_transposed_learns_the_same(model: Any) -> None:
    """GPT-2 keeps its linear layers as ``[in_features, out_features]``."""
    name, straight = next((n, m) for n, m in model.named_modules() if n.endswith("down_proj"))
    swapped = copy.deepcopy(model)
    parent = swapped.get_submodule(name.rpartition(".")[0])
    layer = Conv1D(straight.out_features, straight.in_features)
    layer.weight.data, layer.bias.data = straight.weight.data.T.contiguous(), torch.zeros(straight.out_features)
    parent.down_proj = layer
    lattice = get_grid("nf4").lattice_of(straight.weight.data)
    expected = SHORT.learn(model, [ModelWeight(name, (straight,), False, lattice)], tokens(), 0)
    found = SHORT.learn(swapped.eval(), [ModelWeight(name, (layer,), True, lattice)], tokens(), 0)
    assert (expected[name] == found[name]).float().mean() > 0.999
    assert torch.equal(layer.weight.data, straight.weight.data.T)


def test_a_float16_model_is_trained_in_float32_and_comes_back_as_it_was(model: Any) -> None:
    half = copy.deepcopy(model).half()
    stored = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    learned = learn(SHORT, half)
    assert all(t.dtype == stored[n].dtype and torch.equal(t, stored[n]) for n, t in half.state_dict().items())
    on_the_grid_of_float16 = list(targets(half))
    exact = SHORT.learn(half.float(), on_the_grid_of_float16, tokens(), 0)
    assert same(learned, exact)


def test_a_bfloat16_teacher_is_close(model: Any) -> None:
    exact, rough = learn(SHORT, model), learn(dataclasses.replace(SHORT, teacher_dtype="bfloat16"), model)
    agreement = torch.cat([(exact[name] == rough[name]).view(-1) for name in exact]).float().mean()
    assert 0.95 < agreement <= 1


def test_training_brings_the_quantized_model_nearer_to_full_precision(model: Any) -> None:
    method = QuantGuard(harden=True, steps=20, batch_size=6, lambda1=0.0, lambda2=0.0, learning_rate=0.1)
    learned = learn(method, model)

    @torch.no_grad()
    def divergence(up: dict[str, Tensor] | None) -> float:
        reference = model(input_ids=tokens()).logits
        kept = {}
        for target in targets(model):
            lattice = target.lattice
            chosen = lattice.matrix(lattice.upper_is_nearest) if up is None else up[target.name]
            points = lattice.dequantize(lattice.lower + lattice.from_matrix(chosen))
            weight = target.modules[0].weight.data
            kept[target.name] = weight.clone()
            weight.copy_(lattice.matrix(torch.where(lattice.frozen, lattice.blocks, points)))
        found = method.divergence(reference, model(input_ids=tokens()).logits).item()
        for name, weight in kept.items():
            model.get_submodule(name).weight.data.copy_(weight)
        return found

    assert divergence(learned) < 0.8 * divergence(None)


def test_terms_can_be_left_out() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rounding = SoftRounding(get_grid("nf4").lattice_of(weight))
    assert set(QuantGuard().penalties([rounding])) == {"rev", "dist"}
    assert set(QuantGuard(lambda1=0.0).penalties([rounding])) == {"dist"}
    assert set(QuantGuard(lambda2=0.0).penalties([rounding])) == {"rev"}
    twice = QuantGuard(lambda1=2.0).penalties([rounding])["rev"]
    assert twice.item() == pytest.approx(2 * QuantGuard().penalties([rounding])["rev"].item())
    assert QuantGuard().penalties([rounding])["rev"].item() == pytest.approx(
        20_000 * rounding.reversal_loss().item() / weight.numel()
    )


def test_terms_are_means_of_layers_summed() -> None:
    small, large = (
        SoftRounding(get_grid("nf4").lattice_of(torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))))
        for rows in (2, 16)
    )
    both = QuantGuard().penalties([small, large])["rev"].item()
    alone = sum(QuantGuard().penalties([one])["rev"].item() for one in (small, large))
    assert both == pytest.approx(alone, rel=1e-5)


def test_the_divergence_by_hand() -> None:
    """At temperature 2 the logits (2 ln 3, 0) are odds of 3 to 1; against 1 to 1 that is ln 2 - H(3/4)."""
    teacher, student = torch.tensor([[[2 * math.log(3), 0.0]]]), torch.zeros(1, 1, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert QuantGuard().divergence(teacher, student).item() == pytest.approx(100 * expected, rel=1e-5)


def test_rates_let_the_variables_travel_as_far_as_in_the_paper() -> None:
    four_bit = SoftRounding(get_grid("nf4").lattice_of(torch.randn(2, 64)))
    int8 = SoftRounding(get_grid("int8").lattice_of(torch.randn(2, 64)))
    assert QuantGuard(steps=125).rate_for(four_bit) == 0.01
    assert QuantGuard(steps=125).rate_for(int8) == 0.05
    assert QuantGuard(steps=25).rate_for(four_bit) == pytest.approx(0.05)
    assert QuantGuard(learning_rate=0.3).rate_for(int8) == 0.3


def test_a_loss_that_is_no_number_names_the_step(model: Any) -> None:
    broken = tokens()
    with pytest.raises(CalibrationError, match="step 1 of 4"):
        QuantGuard(steps=4, rev_scale=1e12, dist_scale=1e12, temperature=1e-3, kl_scale=1e12, lambda1=1e12).learn(
            _with_nan(model), targets(model), broken, 0
        )


def _with_nan(model: Any) -> Any:
    """A copy whose norm gives NaN; the weights to guard are untouched."""
    import copy

    broken = copy.deepcopy(model)
    broken.model.norm.weight.data.fill_(float("nan"))
    return broken


def test_early_stop_waits_for_its_patience() -> None:
    stop = EarlyStop(patience=3)
    assert [stop(loss) for loss in (5.0, 4.0, 3.0)] == [False] * 3
    flat = [stop(3.0) for _ in range(60)]
    assert flat[-1]
    assert not any(EarlyStop(patience=0)(1.0) for _ in range(50))


def test_training_stops_early(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything to gain the loss is flat, and a run of many steps ends after its patience."""
    from qcbguard_plugins.defenses import learned_rounding as training

    seen: list[float] = []
    original = training.EarlyStop.__call__

    def count(self: EarlyStop, loss: float) -> bool:
        seen.append(loss)
        return original(self, loss)

    monkeypatch.setattr(training.EarlyStop, "__call__", count)
    learn(QuantGuard(steps=50, patience=3, kl_scale=0.0, lambda1=0.0, learning_rate=1e-8), model)
    assert len(seen) < 10


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"steps": 0}, "steps"),
        ({"band": 0.6}, "band"),
        ({"lambda1": -1.0}, "lambda1"),
        ({"temperature": 0.0}, "temperature"),
        ({"teacher_dtype": "int8"}, "teacher_dtype"),
        ({"kl_scale": 0.0, "lambda1": 0.0, "lambda2": 0.0}, "left out"),
        ({"learning_rate": float("nan")}, "learning_rate"),
    ],
)
def test_a_wrong_parameter_is_refused(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        get_defense("quantguard", **parameters)


def test_a_single_weight_is_not_enough() -> None:
    lattice = get_grid("nf4").lattice_of(torch.randn(4, 64))
    with pytest.raises(CalibrationError, match="whole model"):
        QuantGuard().choose(lattice, ChoiceContext(rng_for(0, "w")))
