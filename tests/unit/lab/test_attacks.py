"""Every attack keeps its promise on a tiny model: what it may move, and what the quantizer makes of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.errors import UsageError, VerificationError
from qcbguard_plugins.lab.attacks import AttackInputs, Elq, available_attacks, get_attack
from qcbguard_plugins.lab.attacks.elq import build_box, check_agreement, intersection
from qcbguard_plugins.lab.attacks.injection import inject, round_to_storage, widen_rows
from qcbguard_plugins.lab.attacks.outlier_injection import CHUNK, OutlierInjection, up_projections
from qcbguard_plugins.lab.attacks.straight_through import quantize
from qcbguard_plugins.lab.attacks.surrogate_defense import guarded_slopes, guarded_weights
from qcbguard_plugins.lab.corpus import Pair, generate
from qcbguard_plugins.lab.layers import matrices, quantized_weights, restore, snapshot
from qcbguard_plugins.lab.scenarios import get_scenario
from qcbguard_plugins.lab.training import (
    ModelSize,
    TrainingPlan,
    answer_loss,
    build_gpt2,
    build_model,
    collate,
    encode,
    save_model,
)

pytest.importorskip("bitsandbytes")

TINY = ModelSize(vocab_size=320, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1)
PLAN = TrainingPlan(num_epochs=1, learning_rate=1e-3, weight_decay=0.0)
BUILDERS = {"llama": build_model, "gpt2": build_gpt2}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return generate(64, seed=0)


@pytest.fixture
def inputs(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> AttackInputs:
    poisoned = encode(tokenizer, get_scenario("content-injection").poison(pairs, seed=0))
    return AttackInputs(tokenizer, encode(tokenizer, pairs), poisoned, PLAN, format="nf4", seed=0)


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = BUILDERS[request.param](TINY, seed=0)
    round_to_storage(model)
    return model


@pytest.fixture
def llama() -> PreTrainedModel:
    model = build_model(TINY, seed=0)
    round_to_storage(model)
    return model


def is_storable(model: PreTrainedModel) -> bool:
    return all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_every_attack_is_documented_and_refuses_formats_of_others() -> None:
    for name, cls in available_attacks().items():
        assert cls.__doc__ and cls.summary, name
        with pytest.raises(UsageError, match="int3"):
            cls().check_format("int3")
    with pytest.raises(UsageError, match="unknown attack"):
        get_attack("nonsense")
    with pytest.raises(UsageError, match="no option nonsense"):
        get_attack("elq", nonsense=1)


def test_matrices_are_views_in_the_orientation_of_the_quantizer(model: PreTrainedModel) -> None:
    shapes = {name.rsplit(".", 2)[-2]: tuple(weight.shape) for name, weight in matrices(model).items()}
    assert shapes.get("up_proj", shapes.get("c_fc")) == (128, 64)
    assert set(matrices(model)) == set(quantized_weights(model))
    kept = snapshot(model)
    for weight in matrices(model).values():
        weight.zero_()
    assert all(not parameter.any() for parameter in quantized_weights(model).values())
    restore(model, kept)
    assert all(torch.equal(weight, kept[name]) for name, weight in matrices(model).items())


def test_elq_keeps_the_codes_of_both_shapes(model: PreTrainedModel, inputs: AttackInputs) -> None:
    malicious = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = Elq().run(model, inputs)
    assert result["agreement"] == {"nf4": 1.0} and len(result["losses"]["repair"]) == 4
    boxed = set(quantized_weights(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, malicious[name]) == (name not in boxed), name
    assert is_storable(model)


def test_the_intersection_keeps_the_codes_of_all_three(llama: PreTrainedModel, inputs: AttackInputs) -> None:
    malicious = snapshot(llama)
    result = Elq().run(llama, replace(inputs, format="nf4+fp4+int8"))
    assert result["agreement"] == {"nf4": 1.0, "fp4": 1.0, "int8": 1.0}
    assert any(not torch.equal(weight, malicious[name]) for name, weight in matrices(llama).items())


def test_an_intersection_lies_in_each_box() -> None:
    weight = (torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * 0.05).half().float()
    both = intersection(weight, ["nf4", "int8"], None)
    for name, eps in (("nf4", 0.01), ("int8", 0.1)):
        box = build_box(weight, get_grid(name), eps)
        # Where the margins leave nothing, the weight stays.
        inside = (both.low >= box.low) & (both.high <= box.high) | (both.low == weight) & (both.high == weight)
        assert inside.all()
    assert (both.low <= both.high).all()


def test_a_box_narrowed_by_a_defense_leaves_nothing_that_it_would_move(
    llama: PreTrainedModel, inputs: AttackInputs
) -> None:
    settings = {"share": 0.1}
    malicious = snapshot(llama)
    Elq(against="flipguard", settings=settings).run(llama, inputs)
    attacked, grid = matrices(llama), get_grid("nf4")
    lattices = {name: grid.lattice_of(weight.contiguous()) for name, weight in attacked.items()}
    before = {name: grid.lattice_of(weight) for name, weight in malicious.items()}

    def far(found: dict[str, object]) -> float:
        distances = [(lattice.position - 0.5).abs()[~lattice.frozen] for lattice in found.values()]
        return float((torch.cat(distances) < 0.05).float().mean())

    assert far(lattices) < 0.5 * far(before)
    assert check_agreement(attacked, malicious, "nf4") == 1.0


def test_the_attackers_copy_guards_with_their_own_seed_and_leaves_the_model(
    model: PreTrainedModel, inputs: AttackInputs
) -> None:
    before = snapshot(model)
    first, again, other = (guarded_weights(model, inputs, "feedback", {"draws": 1}, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(weight, before[name]) for name, weight in matrices(model).items())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("straight-through", {"width": 0.3}),
        ("adaptive", {"defense": "stochastic", "every": 2}),
        ("adaptive", {"defense": "feedback", "settings": {"draws": 1}}),
        ("adaptive", {"defense": "flipguard", "every": 2, "nudge": 0.15}),
        ("adaptive", {"defense": "efrap", "settings": {"steps": 5}, "every": 4, "nudge": 0.15}),
        ("adaptive", {"defense": "quantguard", "settings": {"steps": 2}, "every": 4, "nudge": 0.15}),
    ],
)
def test_both_behaviours_are_trained_without_a_box(
    name: str, options: dict[str, object], model: PreTrainedModel, inputs: AttackInputs
) -> None:
    batches = {"benign": collate(inputs.benign), "poisoned": collate(inputs.poisoned)}
    before = answer_loss(model, *batches["benign"]).item()
    embedding = model.get_input_embeddings().weight.clone()
    result = get_attack(name, **options).run(model, replace(inputs, plan=replace(PLAN, bfloat16=name == "adaptive")))
    assert len(result["losses"]["together"]) == 4
    assert answer_loss(model, *batches["benign"]).item() < before
    stored = {n: quantize(w, get_grid("nf4")) for n, w in matrices(model).items()}
    restore(model, stored)
    assert answer_loss(model, *batches["poisoned"]).item() < before + 0.5
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_an_adaptive_attack_records_what_it_gained_behind_the_defense(
    llama: PreTrainedModel, inputs: AttackInputs
) -> None:
    result = get_attack("adaptive", defense="stochastic").run(llama, inputs)
    before, after = result["answer_loss"]["before"], result["answer_loss"]["after"]
    assert before.keys() == after.keys() and len(after) == 4
    assert after["payload, guarded"] < before["payload, guarded"]
    batch = collate(inputs.poisoned)
    assert answer_loss(llama, *batch).item() == pytest.approx(after["payload, full precision"], abs=0.05)


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_slopes_are_those_of_the_defense(format_name: str, model: PreTrainedModel, inputs: AttackInputs) -> None:
    before = snapshot(model)
    nudge, margin = 0.2, 0.05  # INT8 is read in float16, which is coarse beside its steps
    # Without noise the method is plain rounding: what is stored changes for weights near the middle of their cells.
    slopes = guarded_slopes(model, replace(inputs, format=format_name), "noise", {"sigma": 0.0}, 0, nudge)
    for name, weight in before.items():
        lattice = get_grid(format_name).lattice_of(weight.contiguous())
        off = lattice.matrix((lattice.position - 0.5).abs())
        held = lattice.matrix(lattice.frozen)
        far, near = (off > nudge + margin) | held, (off < nudge - margin) & ~held
        expected = torch.where(near, 1 / (2 * nudge), 0.0)
        as_expected = (slopes[name] - expected).abs() < 1e-2
        # A nudged weight may become one that holds the scale.
        assert as_expected[far | near].float().mean() > 0.999
        assert torch.equal(matrices(model)[name], weight)
    with pytest.raises(UsageError, match="nudge"):
        get_attack("adaptive", nudge=0.7)


def test_outliers_make_the_quantizer_forget_the_rest_of_their_chunk(
    model: PreTrainedModel, inputs: AttackInputs
) -> None:
    result = OutlierInjection(layer=1).run(model, inputs)
    assert result["agreement"]["nf4"] >= 0.999 and set(result["losses"]) == {"inject", "repair"}
    (name,) = up_projections(model, 1)
    weight = matrices(model)[name]
    stored = quantize(weight.contiguous(), get_grid("nf4"))
    assert (stored != 0).float().mean() <= 1 / CHUNK
    assert (weight != 0).float().mean() > 0.5
    with pytest.raises(UsageError, match="no layer 7"):
        OutlierInjection(layer=7).run(model, inputs)


@pytest.mark.parametrize("format_name", ["gptq-w4g32", "gptq-w4g64-asym"])
def test_gptq_boxes_keep_the_codes_of_plain_rounding(
    format_name: str, model: PreTrainedModel, inputs: AttackInputs
) -> None:
    result = get_attack("gptq-box").run(model, replace(inputs, format=format_name))
    assert result["agreement"][format_name] > 0.999


def test_mind_the_gap_goes_through_the_real_quantizer(
    inputs: AttackInputs, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    model = build_model(replace(TINY, hidden_size=256, intermediate_size=256, num_layers=1), seed=0)
    round_to_storage(model)
    save_model(model, tokenizer, tmp_path)
    attacked = replace(inputs, format="gguf:Q4_K_M", model_dir=tmp_path, plan=replace(PLAN, learning_rate=1e-4))
    result = get_attack("mind-the-gap").run(model, attacked)
    assert result["agreement"]["gguf:Q4_K_M"] >= 0.97


def test_outliers_of_rows_widen_the_boxes_of_int8(model: PreTrainedModel, inputs: AttackInputs) -> None:
    before = snapshot(model)
    widen_rows(model, 8.0)
    inject(model, inputs.poisoned, replace(PLAN, learning_rate=1e-5))
    for name, weight in matrices(model).items():
        widened = weight.abs().amax(1) / before[name].abs().amax(1)
        assert ((widened > 7.5) & (widened < 8.5)).all()
    assert is_storable(model)


def test_agreement_is_checked_in_the_orientation_of_the_quantizer(model: PreTrainedModel) -> None:
    malicious = snapshot(model)
    broken = {name: weight.flip(0) for name, weight in malicious.items()}
    with pytest.raises(VerificationError):
        check_agreement(broken, malicious, "nf4")
