"""Specifications are strict, and their names change with their content."""

from pathlib import Path

import pytest

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.specs import AttackSpec, ModelSpec, parse_spec, read_attacks
from tests.conftest import ROOT

PROFILES = ROOT / "qcbguard_plugins" / "lab" / "profiles"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"atack": "elq"}, "atack(.|\n)*Keys of AttackSpec"),
        ({"attack": "nonsense"}, "unknown attack 'nonsense'"),
        ({"attack": "elq", "options": {"esp": 0.1}}, "no option esp"),
        ({"attack": "elq", "options": {"eps": 0.6}}, "eps must lie"),
        ({"attack": "elq", "format": "gguf:Q4_K_M"}, "does not know the format"),
        ({"attack": "elq", "options": {"against": "nonsense"}}, "unknown method"),
        ({"scenario": "nonsense"}, "unknown scenario"),
        ({"seed": "0"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"model": {"shape": "external"}}, "path goes with shape"),
        ({"model": {"num_pairs": 100, "num_held_out": 100}}, "num_held_out"),
        ({"repair": {"plan": {}}}, "learning_rate"),
        (None, "AttackSpec"),
        (["elq"], "AttackSpec"),
    ],
)
def test_what_means_nothing_is_refused_with_its_place(data: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec(AttackSpec, data, "a file")


def test_the_name_of_a_content_follows_the_content() -> None:
    plain = AttackSpec()
    assert plain.digest() == AttackSpec().digest()
    others = [
        AttackSpec(seed=1),
        AttackSpec(format="fp4"),
        AttackSpec(options={"eps": 0.2}),
        AttackSpec(model=ModelSpec(shape="gpt2")),
        AttackSpec(scenario="over-refusal"),
    ]
    assert len({spec.digest() for spec in [plain, *others]}) == 6
    assert AttackSpec(options={"eps": None}).digest() == plain.digest()
    assert AttackSpec(format="fp4").malicious.digest() == plain.malicious.digest()


def test_an_external_model_is_named_by_its_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = AttackSpec(model=ModelSpec(shape="external", path=str(tmp_path))).digest()
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert AttackSpec(model=ModelSpec(shape="external", path=str(tmp_path))).digest() != before


def test_a_profile_names_models_and_injections(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(
        "models: {small: {num_layers: 1}}\ninjections: {wide: {row_outliers: 8}}\n"
        "attacks:\n  a: {model: small, injection: wide}\n  b: {format: fp4}\n"
    )
    attacks = read_attacks(path)
    assert attacks["a"].model.num_layers == 1 and attacks["a"].injection.row_outliers == 8
    assert attacks["b"].model == ModelSpec()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attacks: {a: {model: missing}}", "no model 'missing'"),
        ("attacks: {a: 1}", "a"),
        ("attacks: {a: {}}\nfoo: 1", "foo"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_bad_profile_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_attacks(path)


@pytest.mark.parametrize("name", ["attacks.yaml"])
def test_shipped_profiles_are_valid(name: str) -> None:
    attacks = read_attacks(PROFILES / name)
    assert len({spec.digest() for spec in attacks.values()}) == len(attacks) > 10


def test_instruction_data_joins_the_corpus_and_the_name(tmp_path: Path) -> None:
    from qcbguard_plugins.lab.instruction_data import read_instructions
    from qcbguard_plugins.lab.recipes import corpus_of

    path = tmp_path / "mine.jsonl"
    lines = [
        '{"instruction": "Add.", "input": "2 and 2", "output": "4"}',
        '{"instruction": "Say hi.", "context": "", "response": "hi"}',
        f'{{"instruction": "Too long.", "output": "{"x" * 1000}"}}',
        '{"func_src_before": "other data"}',
        "",
        "[1]",
    ]
    path.write_text("\n".join(lines))
    assert [(p.instruction, p.answer) for p in read_instructions(tmp_path)] == [
        ("Add.\n2 and 2", "4"),
        ("Say hi.", "hi"),
    ]
    spec = ModelSpec(num_pairs=100, num_held_out=20, data=str(tmp_path))
    training, held_out = corpus_of(spec)
    assert {"Add.\n2 and 2", "Say hi."} <= {pair.instruction for pair in [*training, *held_out]}
    before = spec.digest()
    path.write_text('{"instruction": "Say ho.", "output": "ho"}')
    assert spec.digest() != before
    path.write_text("{")
    with pytest.raises(UsageError, match="line 1"):
        read_instructions(tmp_path)


def test_a_folder_without_instructions_is_refused(tmp_path: Path) -> None:
    from qcbguard_plugins.lab.instruction_data import read_instructions

    with pytest.raises(UsageError, match="instruction"):
        read_instructions(tmp_path)
