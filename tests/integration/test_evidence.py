"""Claims, bills of materials and model cards from the command line, each checked by its own tool; and signatures."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from huggingface_hub import ModelCard
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as ResultMessage
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qcbguard_plugins import attest, verify_checkpoint
from qcbguard_plugins.checkpoint.manifest import read_manifest
from qcbguard_plugins.checkpoint.subject import subject_of
from qcbguard_plugins.cli import main
from qcbguard_plugins.cli.render.evidence.intoto import PROVENANCE, TEST_RESULT, VERIFICATION
from qcbguard_plugins.errors import CheckpointError, UsageError
from tests.helpers.gguf_files import write_model
from tests.helpers.signing import make_keys


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The statements of a file, each parsed by in-toto's own package."""
    statements = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for made in statements:
        Statement.copy_from_pb(json_format.ParseDict(made, StatementMessage())).validate()
        message = {PROVENANCE: Provenance, TEST_RESULT: ResultMessage}.get(made["predicateType"])
        if message is not None:
            json_format.ParseDict(made["predicate"], message())
    return statements


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A guarded folder, verified and scanned, with its claims and reports beside it."""
    place = tmp_path_factory.mktemp("evidence")
    (place / "base").mkdir()
    for path in llama_folder.iterdir():
        shutil.copyfile(path, place / "base" / path.name)
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n# The base\n", encoding="utf-8")
    (place / "base" / "model.sig").write_text("of the base", encoding="utf-8")
    option = ("--attest", place / "claims.jsonl")
    guarded = place / "guarded"
    options = ("--for", "nf4", "--method", "stochastic", "--seed", 2**62 + 1)
    assert run("guard", place / "base", *options, "--out", guarded, *option) == 0
    assert run("verify", guarded, "--json", place / "verify.json", *option) == 0
    assert run("scan", guarded, "--for", "nf4,int8", "--json", place / "scan.json", *option) == 0
    return place


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def test_claims_are_about_the_digest_that_is_signed(made: Path, tmp_path: Path) -> None:
    signed = make_keys(tmp_path).sign(made / "guarded", tmp_path / "model.sig")
    statements = lines_of(made / "claims.jsonl")
    assert [line["predicateType"] for line in statements] == [PROVENANCE, VERIFICATION, TEST_RESULT]
    assert all(line["subject"] == [{"name": "guarded", "digest": {"sha256": signed}}] for line in statements)
    assert not (made / "guarded" / "model.sig").exists()


def test_the_provenance_names_base_method_and_seed(made: Path) -> None:
    predicate = lines_of(made / "claims.jsonl")[0]["predicate"]
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    external = definition["externalParameters"]
    assert (external["method"], external["seed"], external["formats"]) == ("stochastic", str(2**62 + 1), ["nf4"])
    weights = hashlib.sha256((made / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert definition["resolvedDependencies"] == [
        {"name": "base", "digest": {"sha256": subject_of(made / "base").sha256}},
        {"name": "base/model.safetensors", "digest": {"sha256": weights}},
    ]
    manifest = hashlib.sha256((made / "guarded" / "qcbguard.json").read_bytes()).hexdigest()
    assert details["byproducts"] == [{"name": "qcbguard.json", "digest": {"sha256": manifest}}]
    assert details["metadata"]["startedOn"] <= details["metadata"]["finishedOn"]


def test_verification_and_scan_say_what_was_found(made: Path) -> None:
    _, verification, scan = (line["predicate"] for line in lines_of(made / "claims.jsonl"))
    assert verification["properties"] == ["QCBGUARD_CODES_AS_PLANNED", "QCBGUARD_CODES_AS_PLANNED:nf4"]
    assert scan["result"] == "WARNED"  # the guarded weights lie on the grid of nf4, where nothing is left to test
    assert {"int8/spectral", "int8/histogram", "outliers", "coverage"} == set(scan["passedTests"])
    digest = hashlib.sha256((made / "scan.json").read_bytes()).hexdigest()
    assert scan["configuration"][0]["digest"]["sha256"] == digest


def test_python_makes_the_same_statement(made: Path) -> None:
    report = read_manifest(made / "guarded")
    statement = attest(report, made / "guarded", base=made / "base")
    assert statement == lines_of(made / "claims.jsonl")[0]
    with pytest.raises(CheckpointError, match="its weights are others"):
        attest(report, made / "guarded", base=made / "guarded")
    with pytest.raises(CheckpointError, match="its weights are others"):
        attest(report, made / "base")


def test_a_signed_guarded_folder_is_refused_by_both_when_it_is_tampered_with(copy: Path) -> None:
    keys, guarded = make_keys(copy), copy / "guarded"
    shutil.copyfile(copy / "claims.jsonl", guarded / "claims.jsonl")
    signed = keys.sign(guarded, guarded / "model.sig", ignore=[guarded / "claims.jsonl"])
    assert all(line["subject"][0]["digest"]["sha256"] == signed for line in lines_of(guarded / "claims.jsonl"))
    keys.check(guarded, guarded / "model.sig")
    assert run("verify", guarded) == 0
    stock = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(guarded, quantization_config=stock)
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()

    whole = (guarded / "model.safetensors").read_bytes()
    tensors = load_file(guarded / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, guarded / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mismatch"):
        keys.check(guarded, guarded / "model.sig")
    claims = copy / "tampered.jsonl"
    assert run("verify", guarded, "--attest", claims) == 1
    assert lines_of(claims)[0]["predicate"]["properties"] == []
    report = verify_checkpoint(guarded)
    assert attest(report, guarded)["predicate"]["properties"] == []
    with pytest.raises(CheckpointError, match="its weights are others"):
        attest(report.model_copy(update={"tensors": (), "changed_files": (), "folder_problems": ()}), guarded)

    (guarded / "model.safetensors").write_bytes(whole)
    keys.check(guarded, guarded / "model.sig")
    (guarded / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="mismatch"):
        keys.check(guarded, guarded / "model.sig")
    assert subject_of(guarded).sha256 != signed


def test_a_card_keeps_the_old_one_and_moves_the_claims(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded, claims = copy / "guarded", copy / "claims.jsonl"
    evidence = ("--report", copy / "verify.json", "--report", copy / "scan.json", "--claims", claims)
    before = subject_of(guarded)
    assert run("card", guarded, *evidence, "--base-model", "Org/Base") == 0
    assert "3 claims are about the folder with it" in capsys.readouterr().out
    card = ModelCard.load(guarded / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "Org/Base")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.tags == ["qcbguard", "guarded-nf4"]
    assert card.text.startswith("# The base\n")
    assert "14 of 14 target tensors guarded for nf4 with stochastic" in card.text
    assert "On the grid of nf4 already" in card.text
    assert "Not stated here**: whether the quantized model behaves as the full-precision model" in card.text
    after = subject_of(guarded)
    assert after.sha256 != before.sha256
    assert {line["subject"][0]["digest"]["sha256"] for line in lines_of(claims)} == {after.sha256}
    first = (guarded / "README.md").read_bytes()
    assert run("card", guarded, *evidence, "--base-model", "Org/Base") == 0
    assert (guarded / "README.md").read_bytes() == first
    assert run("verify", guarded) == 0


def test_a_bill_of_materials_is_valid_and_whole(copy: Path) -> None:
    guarded, out = copy / "guarded", copy / "bom.json"
    options = ("--report", copy / "verify.json", "--claims", copy / "claims.jsonl", "--base-model", "Org/Base")
    assert run("bom", guarded, *options, "--out", out) == 0
    text = out.read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    (ancestor,) = model["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["purl"]) == ("base", "pkg:huggingface/Org/Base")
    values = {p["name"]: p["value"] for p in model["properties"]}
    subject = subject_of(guarded)
    assert values["qcbguard:model-signing:root-digest"] == f"sha256:{subject.sha256}"
    types = {name.rpartition(":")[2]: int(v) for name, v in values.items() if name.startswith("qcbguard:tensor-type:")}
    assert types["nf4"] == 14
    assert sum(types.values()) == len(load_file(guarded / "model.safetensors"))
    hashes = {c["name"]: c["hashes"][0]["content"] for c in model["components"]}
    assert hashes == subject.files
    texts = [note["text"] for note in bom["annotations"]]
    assert len(texts) == 2
    assert "stores the planned codes of 14 of 14 guarded tensors" in texts[1]


def test_evidence_about_other_bytes_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded = copy / "guarded"
    evidence = ("--report", copy / "scan.json", "--claims", copy / "claims.jsonl")
    assert run("bom", guarded, "--report", copy / "scan.json") == 4
    report = json.loads((copy / "scan.json").read_text())
    (copy / "other.json").write_text(json.dumps(report | {"seed": 1}, indent=2) + "\n")
    assert run("card", guarded, "--report", copy / "other.json", *evidence[2:]) == 2
    (copy / "guard.json").write_text((guarded / "qcbguard.json").read_text())
    assert run("card", guarded, "--report", copy / "guard.json", *evidence[2:]) == 2
    (guarded / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert run("card", guarded, *evidence) == 2
    assert "no claim binds scan.json" in capsys.readouterr().err
    tensors = load_file(guarded / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, guarded / "model.safetensors")
    assert run("bom", guarded) == 2
    assert run("card", guarded) == 2
    assert (guarded / "README.md").read_text() == "---\nlicense: mit\n---\n# The base\n"


def test_attest_is_refused_before_the_work(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded, out = copy / "guarded", copy / "new"
    (copy / "full").write_text("something else\n", encoding="utf-8")
    guard = ("guard", copy / "base", "--for", "nf4", "--method", "stochastic", "--out", out)
    assert run(*guard, "--attest", copy / "full") == 2
    assert run(*guard, "--attest", copy / "base" / "inside.jsonl") == 4
    assert run(*guard, "--attest", out / "inside.jsonl") == 4
    assert run(*guard, "--attest", copy / "missing" / "claims.jsonl") == 4
    assert not out.exists()
    assert run("verify", guarded, "--attest", guarded / "README.md") == 4
    assert "would change its digest" in capsys.readouterr().err
    before = subject_of(guarded).sha256
    assert run("verify", guarded, "--attest", guarded / "claims.jsonl") == 0
    assert lines_of(guarded / "claims.jsonl")[0]["subject"][0]["digest"]["sha256"] == before


def test_unguarded_tensors_are_never_claimed_as_planned(llama: Path, tmp_path: Path) -> None:
    out, claims = tmp_path / "out", tmp_path / "claims.jsonl"
    options = ("--for", "nf4", "--method", "stochastic", "--ignore", "*down_proj*", "--out", out)
    assert run("guard", llama, *options, "--attest", claims) == 3
    assert run("verify", out, "--attest", claims) == 3
    provenance, verification = (line["predicate"] for line in lines_of(claims))
    assert len(provenance["buildDefinition"]["externalParameters"]["unguarded"]) == 2
    assert verification["properties"] == []


def test_a_gguf_file_is_its_sha256(tmp_path: Path) -> None:
    source, out, claims = write_model(tmp_path / "in.gguf"), tmp_path / "out.gguf", tmp_path / "claims.jsonl"
    assert run("gguf", source, out, "--for", "Q8_0", "--attest", claims) == 0
    (line,) = lines_of(claims)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert line["subject"] == [{"name": "out.gguf", "digest": {"sha256": digest}}]
    assert line["predicate"]["buildDefinition"]["resolvedDependencies"] == [
        {"name": "in.gguf", "digest": {"sha256": hashlib.sha256(source.read_bytes()).hexdigest()}}
    ]


def test_the_base_of_a_gguf_file_must_be_said(tmp_path: Path) -> None:
    from qcbguard_plugins.pipeline.gguf_guard import guard_gguf

    source, out = write_model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    report = guard_gguf(source, out, "Q8_0")
    with pytest.raises(UsageError, match="does not hash what was read"):
        attest(report, out)


@pytest.mark.slow
def test_diff_and_purify_attest_too(llama: Path, tmp_path: Path) -> None:
    claims, data = tmp_path / "claims.jsonl", tmp_path / "clean.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One.\nTwo.\nThree.\n", encoding="utf-8")
    code = run("diff", llama, "--for", "nf4", "--prompts", prompts, "--draws", 3, "--seed", 1, "--attest", claims)
    assert code in (0, 1)
    rows = [{"instruction": f"Name {i} birds.", "output": f"An owl, and {i} more."} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    small = {
        "num_variants": 2, "num_samples": 6, "variant_epochs": 1, "variant_learning_rate": 1e-3, "ratio": 0.1,
        "num_healing": 4, "healing_epochs": 1, "healing_learning_rate": 1e-4, "max_length": 96,
    }  # fmt: skip
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    out = tmp_path / "purified"
    assert run("purify", llama, "--clean-data", data, "--out", out, *settings, "--attest", claims) == 0
    difference, purification = lines_of(claims)
    assert difference["predicate"]["result"] == ("FAILED" if code else "PASSED")
    assert difference["subject"][0]["digest"]["sha256"] == subject_of(llama).sha256
    assert purification["subject"] == [{"name": "purified", "digest": {"sha256": subject_of(out).sha256}}]
    names = [entry["name"] for entry in purification["predicate"]["buildDefinition"]["resolvedDependencies"]]
    assert names == [llama.name, f"{llama.name}/model.safetensors", "clean.jsonl"]
