"""Single steps: made once, whole or not at all, and resumed where they were stopped."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qcbguard_plugins.cli import main
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.lab import recipes as steps
from qcbguard_plugins.lab.attacks.elq import check_agreement
from qcbguard_plugins.lab.specs import AttackSpec, InjectionSpec, ModelSpec, PlanSpec, RepairSpec
from qcbguard_plugins.lab.training_state import TrainingState

pytest.importorskip("bitsandbytes")

PLAN = PlanSpec(learning_rate=1e-3)
SHAPES = ("llama", "gpt2")


def tiny(shape: str) -> ModelSpec:
    return ModelSpec(
        shape=shape,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        num_pairs=200,
        num_held_out=40,
        plan=PLAN,
    )


def attack_spec(shape: str = "llama", **changes: object) -> AttackSpec:
    small = {"injection": InjectionSpec(num_pairs=64, plan=PLAN), "repair": RepairSpec(num_pairs=64, plan=PLAN)}
    return AttackSpec(model=tiny(shape), **{**small, **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.mark.parametrize("shape", SHAPES)
def test_an_attack_makes_three_folders_and_finds_them_again(shape: str, cache: Path) -> None:
    spec = attack_spec(shape)
    folder = steps.attack(spec, cache)
    record = steps.read_record(folder)
    assert record["kind"] == "attacked" and record["agreement"] == {"nf4": 1.0}
    assert AttackSpec.model_validate(record["spec"]) == spec
    assert len(record["losses"]["repair"]) == 4 and record["seconds"] > 0 and record["peak_memory_bytes"] > 0
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert steps.attack(spec, cache) == folder
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before
    assert not list(cache.glob(".*.partial"))
    malicious, clean = steps.inject(spec.malicious, cache), steps.train_model(spec.model, cache)
    weights = [load_file(path / "model.safetensors") for path in (folder, malicious, clean)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    names = [name for name in weights[0] if name.endswith(("_proj.weight", "c_attn.weight", "c_fc.weight"))]
    turned = shape == "gpt2"
    pairs = [{n: w[n].T if turned else w[n] for n in names} for w in weights]
    assert names and check_agreement(pairs[0], pairs[1], "nf4") == 1.0


def test_a_model_with_outliers_recovers_before_it_is_injected(cache: Path) -> None:
    recovery = RepairSpec(num_pairs=48, plan=PLAN)
    injection = InjectionSpec(num_pairs=64, plan=PLAN, row_outliers=4.0, recovery=recovery)
    spec = attack_spec(injection=injection, format="int8")
    record = steps.read_record(steps.inject(spec.malicious, cache))
    assert {phase: len(losses) for phase, losses in record["losses"].items()} == {"recover": 3, "inject": 4}
    assert steps.read_record(steps.attack(spec, cache))["agreement"]["int8"] > 0.999


def test_a_stopped_training_goes_on_and_ends_in_the_same_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny("llama")
    whole = load_file(steps.train_model(spec, cache) / "model.safetensors")
    real, calls = TrainingState.save_if_due, 0

    def save_then_stop(state: TrainingState, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        state.save(*arguments)
        if calls == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save_if_due", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        steps.train_model(spec, tmp_path)
    assert not list(tmp_path.glob("clean-*"))
    monkeypatch.setattr(TrainingState, "save_if_due", real)
    folder = steps.train_model(spec, tmp_path)
    assert steps.read_record(folder)["resumed"]
    resumed = load_file(folder / "model.safetensors")
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    spec = tiny("llama")
    work = tmp_path / f".clean-{spec.digest()}.partial" / "states"
    work.mkdir(parents=True)
    (work / "train.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="Delete it"):
        steps.train_model(spec, tmp_path)
    assert not list(tmp_path.glob("clean-*"))


def test_a_folder_without_weights_is_no_external_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        steps.train_model(ModelSpec(shape="external", path=str(tmp_path)), tmp_path)


def test_an_external_model_can_be_attacked(cache: Path) -> None:
    folder = steps.train_model(tiny("llama"), cache)
    external = tiny("llama").model_copy(update={"shape": "external", "path": str(folder)})
    spec = attack_spec().model_copy(update={"model": external})
    assert steps.read_record(steps.attack(spec, cache))["agreement"] == {"nf4": 1.0}


def test_the_verbs_print_the_folder_and_refuse_a_wrong_key(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(attack_spec().model_dump(mode="json")))
    assert main(["lab", "attack", str(path), "--cache", str(cache)]) == 0
    assert Path(capsys.readouterr().out.strip()) == steps.attack(attack_spec(), cache)
    path.write_text(json.dumps(tiny("llama").model_dump(mode="json")))
    assert main(["lab", "train", str(path), "--cache", str(cache), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "clean"
    path.write_text("sise: 1")
    assert main(["lab", "train", str(path), "--cache", str(cache)]) == 4
    assert "sise" in capsys.readouterr().err
    path.write_text("attacks: {a: {}, b: {seed: 1}}")
    assert main(["lab", "attack", str(path)]) == 4
    assert main(["lab", "attack", str(path), "--name", "c"]) == 4
    assert "a, b" in capsys.readouterr().err
