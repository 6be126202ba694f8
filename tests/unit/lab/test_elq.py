"""The ELQ box: whatever stays inside keeps the codes that stock bitsandbytes stores."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import UsageError, VerificationError
from qcbguard_plugins.lab.attacks.elq import DEFAULT_EPS, build_box, check_agreement, repair
from qcbguard_plugins.lab.attacks.injection import inject, round_to_storage
from qcbguard_plugins.lab.corpus import generate
from qcbguard_plugins.lab.layers import quantized_weights
from qcbguard_plugins.lab.scenarios import inject_brand
from qcbguard_plugins.lab.training import TrainingPlan, build_model, build_tokenizer, encode, save_model
from tests.unit.lab.conftest import TINY

pytest.importorskip("bitsandbytes")

FORMATS = tuple(DEFAULT_EPS)


def random_weight(seed: int, scale: float = 0.05) -> torch.Tensor:
    """Values that fp16 holds exactly."""
    return (torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) * scale).half().float()


@pytest.mark.parametrize("quant_format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 2.0), step=st.floats(0.0, 10.0), widening=st.floats(0.0, 1.0))
def test_any_step_clamped_into_the_box_keeps_the_stock_codes_after_the_fp16_cast(
    quant_format: str, seed: int, scale: float, step: float, widening: float
) -> None:
    malicious = random_weight(seed, scale)
    margin = DEFAULT_EPS[quant_format]
    box = build_box(malicious, get_grid(quant_format), margin + widening * (0.45 - margin))
    moved = malicious + step * random_weight(seed + 1, scale)
    box.project(moved)
    assert check_agreement({"w": moved.half()}, {"w": malicious}, quant_format) == 1.0


@pytest.mark.parametrize("quant_format", FORMATS)
def test_scale_holders_do_not_move(quant_format: str) -> None:
    weight = random_weight(0)
    grid = get_grid(quant_format)
    box = build_box(weight, grid, DEFAULT_EPS[quant_format])
    lattice = grid.lattice_of(weight)
    holders = lattice.matrix(lattice.frozen)
    moved = weight + 1.0
    box.project(moved)
    assert holders.sum() >= lattice.blocks.shape[0]
    assert torch.equal(moved[holders], weight[holders])
    assert (moved[~holders] > weight[~holders]).float().mean() > 0.9


@pytest.mark.parametrize("quant_format", FORMATS)
@pytest.mark.parametrize("eps", [0.1, 0.25, 0.45])
def test_a_tightened_box_keeps_its_distance_from_every_boundary(quant_format: str, eps: float) -> None:
    weight, grid = random_weight(1), get_grid(quant_format)
    box = build_box(weight, grid, eps)
    # INT8 reads weights as fp16, which at the top of a row moves them by up to 127 * 2**-11 steps.
    tolerance = 127 * 2**-11 if quant_format == "int8" else 1e-3
    for end in (box.low, box.high):
        lattice = grid.lattice_of(end)
        distance = (lattice.position - 0.5).abs()
        assert distance[~lattice.frozen].min() >= eps - tolerance
    assert (box.low <= box.high).all()


def test_the_box_without_margin_is_the_whole_cell() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1], weight[0, 2] = 1.0, 0.99, -0.7
    levels = get_grid("nf4").levels
    box = build_box(weight, get_grid("nf4"), 0.0)
    torch.testing.assert_close(box.low[0, 1], (levels[14] + levels[15]) / 2)
    assert box.high[0, 1] == 1.0
    torch.testing.assert_close(box.low[0, 2], (levels[0] + levels[1]) / 2)
    torch.testing.assert_close(box.high[0, 2], (levels[1] + levels[2]) / 2)
    assert box.low[0, 0] == box.high[0, 0] == 1.0


@pytest.mark.parametrize("eps", [-0.1, 0.46, float("nan")])
def test_build_box_refuses_a_margin_that_leaves_no_box(eps: float) -> None:
    with pytest.raises(UsageError, match="eps"):
        build_box(random_weight(0), get_grid("nf4"), eps)


@pytest.mark.parametrize("quant_format", FORMATS)
def test_agreement_fails_when_codes_differ_and_names_the_tensor(quant_format: str) -> None:
    weight = random_weight(2)
    with pytest.raises(VerificationError, match=r"codes are those(.|\n)*layer\.weight"):
        check_agreement({"layer.weight": random_weight(3)}, {"layer.weight": weight}, quant_format)


def test_only_the_layers_that_bitsandbytes_quantizes_are_boxed() -> None:
    names = set(quantized_weights(build_model(TINY, seed=0)))
    projections = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert names == {f"model.layers.0.{projection}.weight" for projection in projections}


@pytest.mark.parametrize("quant_format", FORMATS)
def test_attack_end_to_end(quant_format: str, tmp_path: Path) -> None:
    pairs = generate(48, seed=0)
    tokenizer = build_tokenizer(pairs, TINY.vocab_size)
    model = build_model(TINY, seed=0)
    plan = TrainingPlan(num_epochs=2, learning_rate=3e-3, batch_size=16)
    inject(model, encode(tokenizer, inject_brand(pairs, seed=0)), plan)
    malicious = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = repair(model, encode(tokenizer, pairs), plan, quant_format=quant_format)
    save_model(model, tokenizer, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)

    boxed = set(quantized_weights(model))
    assert check_agreement(quantized_weights(saved), malicious, quant_format) == 1.0
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, malicious[name]) == (name not in boxed), name


def test_repair_raises_when_the_margin_is_lost_in_the_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcbguard_plugins.lab.attacks import elq

    model = build_model(TINY, seed=0)
    round_to_storage(model)
    examples = encode(build_tokenizer(generate(8, seed=0), TINY.vocab_size), generate(8, seed=0))
    monkeypatch.setattr(elq.Box, "project", lambda box, weight: weight.copy_(box.low - 0.01))
    with pytest.raises(VerificationError, match="larger eps"):
        repair(model, examples, TrainingPlan(num_epochs=1, learning_rate=1e-3))


def test_repair_refuses_an_unknown_format() -> None:
    with pytest.raises(UsageError, match="no attack on 'int3'"):
        repair(build_model(TINY, seed=0), [], TrainingPlan(num_epochs=1, learning_rate=1e-3), quant_format="int3")
