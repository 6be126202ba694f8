"""The rivals of purification, and which updates a swap keeps."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.studies.purification.__main__ import ours
from benchmarks.studies.purification.ablation import keep_updates, shuffle_mlp_updates
from benchmarks.studies.purification.baselines import prune_by_magnitude, prune_by_wanda
from benchmarks.studies.purification.plots import draw_attacks, draw_curve
from benchmarks.studies.purification.specs import AdapterSpec, LabSettings, PurifiedSpec, VariantsSpec
from benchmarks.studies.purification.study import NONE, StudyCell
from benchmarks.studies.purification.tables import attacks_table, means_table, table
from qcbguard_plugins.lab.corpus import generate
from qcbguard_plugins.lab.evaluation import Measurement
from qcbguard_plugins.lab.intervals import share
from qcbguard_plugins.lab.layers import matrices
from qcbguard_plugins.lab.scenarios import Verdict, get_scenario
from qcbguard_plugins.lab.specs import MaliciousSpec
from qcbguard_plugins.purification.config import PurifyConfig, config_of
from qcbguard_plugins.purification.consistency import EPSILON, PUBLISHED_WEIGHT, inconsistency
from qcbguard_plugins.purification.finetuning import collate, finetune
from qcbguard_plugins.purification.samples import Tokens

EXAMPLES = [Tokens([1, 3 + i, 4 + i], [5 + i, 2]) for i in range(16)]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def test_magnitude_pruning_clears_the_smallest_weights_of_each_layer(model: Any) -> None:
    before = {name: weight.clone() for name, weight in matrices(model).items()}
    prune_by_magnitude(model, 0.35)
    for name, weight in matrices(model).items():
        cleared = weight == 0
        assert cleared.sum() == round(0.35 * weight.numel())
        assert before[name][cleared].abs().max() <= before[name][~cleared].abs().min()


def test_wanda_weighs_by_the_inputs_and_passes_over_padding(model: Any) -> None:
    before = {name: weight.clone() for name, weight in matrices(model).items()}
    batch = collate(EXAMPLES[:4], 0)
    inputs: list[torch.Tensor] = []
    name = "model.layers.0.self_attn.q_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    score = before[f"{name}.weight"].abs() * inputs[0].flatten(0, 1).norm(dim=0)
    prune_by_wanda(model, 0.5, batch["input_ids"], batch["attention_mask"])
    assert all(((weight == 0).sum(dim=1) == weight.shape[1] // 2).all() for weight in matrices(model).values())
    cleared = matrices(model)[f"{name}.weight"] == 0
    for row in range(len(score)):
        assert score[row][cleared[row]].max() <= score[row][~cleared[row]].min()


def test_crow_keeps_layers_alike_under_a_perturbation(model: Any, tmp_path: Path) -> None:
    batch = collate(EXAMPLES, 0)
    found = []
    for weight in (0.0, PUBLISHED_WEIGHT):
        trained = copy.deepcopy(model)
        finetune(
            trained,
            EXAMPLES,
            what="crow",
            num_epochs=5,
            learning_rate=2e-3,
            batch_size=8,
            seed=0,
            work_dir=tmp_path,
            consistency=weight,
        )
        with torch.no_grad():
            embeddings = trained.get_input_embeddings()(batch["input_ids"])
            sign = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)).sign()
            perturbed = embeddings + EPSILON * sign
            found.append(float(inconsistency(trained, perturbed, batch["attention_mask"])))
    assert found[1] < 0.8 * found[0]


def test_a_swap_keeps_some_updates_or_shifts_those_of_the_mlps(model: Any) -> None:
    clean = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attacked = {name: tensor + (1 if "layers.0" in name else 2) for name, tensor in clean.items()}
    kept = keep_updates(lambda name: ".mlp." in name)(clean, attacked)
    assert all(torch.equal(kept[name], (attacked if ".mlp." in name else clean)[name]) for name in clean)
    shifted = shuffle_mlp_updates(1)(clean, attacked)
    for name in clean:
        update = (shifted[name] - clean[name]).mean().round().item()
        own = 1 if "layers.0" in name else 2
        assert update == (3 - own if ".mlp." in name else own)


def test_a_name_of_a_folder_depends_on_all_that_decides_it() -> None:
    attacked = MaliciousSpec(scenario="over-refusal+badnets")
    settings = LabSettings()
    same = VariantsSpec(attacked=attacked, settings=settings.model_copy(update={"ratio": 0.9}))
    assert same.digest() == VariantsSpec(attacked=attacked).digest()
    others = [
        PurifiedSpec(attacked=attacked),
        PurifiedSpec(attacked=attacked, settings=settings.model_copy(update={"ratio": 0.9})),
        PurifiedSpec(attacked=attacked, method="crow"),
        PurifiedSpec(attacked=attacked, method="matched-channels"),
        PurifiedSpec(attacked=attacked, settings=settings.model_copy(update={"healing_keys": 0.5})),
        PurifiedSpec(attacked=attacked, settings=settings.model_copy(update={"healing_consistency": 5.5})),
        PurifiedSpec(attacked=attacked, settings=settings.model_copy(update={"healing_search": 0.5})),
        PurifiedSpec(attacked=attacked, signature_of=MaliciousSpec(scenario="over-refusal+vpi")),
        PurifiedSpec(attacked=MaliciousSpec(scenario="over-refusal+vpi")),
        PurifiedSpec(attacked=AdapterSpec(scenario="over-refusal+vpi")),
    ]
    assert len({spec.digest() for spec in others}) == len(others)


def test_two_backdoors_are_taught_together_and_judged_apart() -> None:
    scenario = get_scenario("content-injection&over-refusal+badnets")
    pairs = generate(60, 0)
    poisoned = scenario.poison(pairs, seed=0)
    assert [scenario.judge(pair, pair.answer) for pair in poisoned] == [Verdict.HIT] * 60 + [Verdict.MISS] * 60
    refusal = get_scenario("over-refusal+badnets")
    repaired = scenario.training(pairs, seed=0)
    assert repaired[:60] == pairs
    assert {refusal.judge(pair, pair.answer) for pair in repaired[60:]} == {Verdict.HIT}
    assert scenario.questions(pairs) == pairs


def test_a_table_says_where_a_mean_is_of_fewer_models(tmp_path: Path) -> None:
    def cell(scenario: str, label: str, hits: int) -> StudyCell:
        found = Measurement(
            asr=share(hits, 10),
            unparsed=share(0, 10),
            quiet_asr=share(1, 10),
            task_accuracy=None,
            perplexity=share(5, 10),
            kl=None,
            verdicts="",
        )
        return StudyCell(scenario=scenario, label=label, measurement=found)

    cells = [cell("a", "x 1", 10), cell("b", "x 1", 5), cell("a", "x 2", 2)]
    lines = table(cells, ["a", "b", "c"], ["x 1", "x 2", "x 3"]).splitlines()
    assert lines[0].startswith("| method | a | b | mean ASR") and len(lines) == 4
    assert lines[2].startswith("| x 1 | 100 | 50 | 75 | 10 |")
    assert lines[3].startswith("| x 2 | 20 |  | 20 (1 of 2) | 10 |")
    rows = attacks_table(
        [*cells, cell("a", NONE, 10), cell("b", NONE, 5)], ["a", "b"], [NONE, "x 1", "x 2"]
    ).splitlines()
    assert rows[2] == "| a | 100 () | 100 () | 20 () |" and rows[3] == "| b | 50 () | 50 () |  |"
    means = means_table([*cells, cell("a", NONE, 10), cell("b", NONE, 5)], [NONE, "x 1", "x 2"], "x 1").splitlines()
    assert means[2].startswith("| none | 2 | 75.0 | 100 | 100 | 10 |") and means[2].endswith("| 75.0,  |")
    assert means[4].startswith("| x 2 | 1 | 20.0 | 20 | 20 | 10 |") and means[4].endswith("| 100.0,  |")
    draw_curve(cells, ["x 1", "x 2"], "x", tmp_path / "curve.svg")
    draw_attacks(cells, ["x 1", "x 2"], tmp_path / "attacks.svg")
    assert (tmp_path / "attacks.svg").stat().st_size > 1_000
    assert (tmp_path / "curve.svg").read_text().count("a, x") == 1


def test_the_default_of_purify_is_what_the_study_chose() -> None:
    spec = ours(MaliciousSpec(scenario="over-refusal+badnets")).spec
    assert spec is not None and spec.method == "fine-tuning"  # no suppression
    chosen, default = spec.settings.config, config_of("llama", 2_900_000, adapter=False)
    fields = [name for name in PurifyConfig.model_fields if name.startswith("healing_")]
    for name in (*fields, "num_healing", "batch_size", "score"):
        assert getattr(default, name) == getattr(chosen, name), name
    assert default.needed_variants == 0
