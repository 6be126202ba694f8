"""The evidence in examples/evidence hangs together, and each piece is valid by its own tool."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

from qcbguard_plugins.checkpoint.manifest import read_manifest
from qcbguard_plugins.checkpoint.subject import subject_of
from qcbguard_plugins.cli.render.evidence import intoto
from qcbguard_plugins.cli.render.evidence.card import section
from qcbguard_plugins.cli.render.evidence.facts import Evidence
from tests.conftest import ROOT

SHOWN = ROOT / "examples" / "evidence"
BASE = ROOT / "examples" / "models" / "attacked"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def signed() -> dict[str, Any]:
    """What the signature is over."""
    bundle = json.loads((SHOWN / "model.sig").read_text(encoding="utf-8"))
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def claims(name: str) -> list[dict[str, Any]]:
    made = intoto.read_statements(SHOWN / name)
    for statement in made:
        intoto.validate(statement)
    return made


def test_the_claims_are_about_what_was_signed_and_its_base() -> None:
    root = signed()["subject"][0]["digest"]["sha256"]
    made = claims("claims.jsonl")
    assert len(made) == 4
    assert {statement["subject"][0]["digest"]["sha256"] for statement in made} == {root}
    base = subject_of(BASE)
    (scan,) = claims("base-claims.jsonl")
    assert scan["subject"][0]["digest"]["sha256"] == base.sha256
    assert scan["predicate"]["result"] == "FAILED"
    dependencies = made[0]["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [entry["digest"]["sha256"] for entry in dependencies] == [base.sha256, base.files["model.safetensors"]]


def test_the_signature_covers_the_pieces_that_lie_in_the_folder() -> None:
    resources = {entry["name"]: entry["digest"] for entry in signed()["predicate"]["resources"]}
    for name in ("README.md", "qcbguard.json"):
        assert resources[name] == sha256(SHOWN / name)
    assert resources["model.safetensors"] == read_manifest(SHOWN).files[0].sha256_out
    assert not {"claims.jsonl", "model.sig"} & resources.keys()


def test_the_claims_name_the_reports() -> None:
    results = {
        s["predicate"]["configuration"][0]["name"]: s
        for s in claims("claims.jsonl")
        if s["predicateType"] == intoto.TEST_RESULT
    }
    for name in ("scan.json", "diff.json"):
        assert results[name]["predicate"]["configuration"][0]["digest"]["sha256"] == sha256(SHOWN / name)
        assert results[name]["predicate"]["failedTests"] == []


def test_card_and_bill_of_materials() -> None:
    card = ModelCard.load(SHOWN / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    guard = read_manifest(SHOWN)
    alone = section(Evidence(SHOWN, subject_of(SHOWN), guard)).splitlines()
    assert next(line for line in alone if line.startswith("- **Guarded**")) in card.text
    text = (SHOWN / "bom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_7).validate_str(text) is None
    values = {p["name"]: p["value"] for p in json.loads(text)["metadata"]["component"]["properties"]}
    assert values["qcbguard:model-signing:root-digest"] == f"sha256:{signed()['subject'][0]['digest']['sha256']}"
    assert values["qcbguard:tensor-type:nf4"] == "28"
