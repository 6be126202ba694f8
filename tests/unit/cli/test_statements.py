"""What a report claims: never more than it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcbguard_plugins import attest
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, TensorVerdict, VerifyReport, read_manifest
from qcbguard_plugins.checkpoint.subject import Subject, subject_of
from qcbguard_plugins.checkpoint.uncovered import UncoveredTensor
from qcbguard_plugins.cli.render.evidence import intoto
from qcbguard_plugins.cli.render.evidence.facts import guard_sentences, measured_sentences
from qcbguard_plugins.cli.render.evidence.statements import AS_PLANNED, report_sha256, report_text
from qcbguard_plugins.detection.behaviour.report import DiffReport
from qcbguard_plugins.detection.behaviour.sign_randomization import rounded
from qcbguard_plugins.detection.weights.report import ScanReport
from qcbguard_plugins.detection.weights.scan import scan_model
from qcbguard_plugins.errors import CheckpointError, UsageError
from tests.conftest import ROOT
from tests.helpers.detection_models import attacked_folder, clean_folder, random_weight

MODEL = Subject("m", "0" * 64, {MANIFEST_FILE: "1" * 64})
VERSIONS = {"qcbguard-plugins": "0.1.0"}
UNCOVERED = UncoveredTensor(key="experts", shape=(2, 4, 4), num_weights=32, num_bytes=64, reason="fused experts")
CREATED = "2026-12-01T10:00:00+02:00"


def verification(**changes: object) -> VerifyReport:
    tensors = (TensorVerdict(name="a", as_planned=True), TensorVerdict(name="b", as_planned=True))
    values: dict[str, object] = {
        "created": CREATED,
        "versions": VERSIONS,
        "folder": "m",
        "formats": ("nf4",),
        "tensors": tensors,
        "changed_files": (),
        "unguarded": (),
    }
    return VerifyReport(**(values | changes))


def difference(**changes: object) -> DiffReport:
    values: dict[str, object] = {
        "created": CREATED,
        "versions": VERSIONS,
        "model": "m",
        "format": "nf4",
        "seed": 2**62 + 1,
        "divergence": 0.1,
        "randomized": (0.1, 0.1),
        "ratio": 1.0,
        "p_value": 0.4,
        "differs": False,
        "words": (),
        "chance_z": 0.0,
        "prompts": (),
        "num_prompts": 3,
        "num_tokens": 30,
        "num_targets": 2,
        "elapsed_s": 1.0,
    }
    return DiffReport(**(values | changes))


def scan(folder: Path, *formats: str) -> tuple[ScanReport, dict[str, object]]:
    report = scan_model(folder, formats, seed=3)
    return report, attest(report, folder)["predicate"]


def test_a_verification_lists_what_holds() -> None:
    predicate = attest(verification(), MODEL)["predicate"]
    assert predicate["properties"] == [AS_PLANNED, f"{AS_PLANNED}:nf4"]
    assert predicate["verifier"]["policies"] == [{"name": MANIFEST_FILE, "digest": {"sha256": "1" * 64}}]
    assert predicate["timeCreated"] == "2026-12-01T08:00:00Z"


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": ()},
        {"tensors": (TensorVerdict(name="a", as_planned=False, reason="missing"),)},
        {"unguarded": ("b",)},
        {"uncovered": (UNCOVERED,)},
        {"folder_problems": ("config.json  has changed",)},
        {"changed_files": ("model.safetensors",)},
    ],
)
def test_a_verification_that_is_not_whole_lists_nothing(changes: dict[str, object]) -> None:
    assert attest(verification(**changes), MODEL)["predicate"]["properties"] == []


def test_what_is_not_covered_is_named() -> None:
    report = verification(uncovered=(UNCOVERED,))
    assert "NOT covered: experts." in measured_sentences(report)
    guard = read_manifest(ROOT / "examples" / "evidence").model_copy(update={"uncovered": (UNCOVERED,), "files": ()})
    assert "NOT covered: experts." in guard_sentences(guard)
    predicate = attest(guard, MODEL, base=MODEL)["predicate"]
    assert predicate["buildDefinition"]["internalParameters"]["uncovered"] == ["experts"]


def test_a_verification_without_a_plan_is_refused() -> None:
    with pytest.raises(UsageError, match="carries no plan"):
        attest(verification(), Subject("m", "0" * 64, {}))


def test_a_report_about_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="about m, and not about other"):
        attest(verification(), Subject("other", "0" * 64, MODEL.files))


def test_a_clean_scan_passes_every_test(tmp_path: Path) -> None:
    report, predicate = scan(clean_folder(tmp_path / "m"), "nf4", "int8")
    assert report.verdict == "clean"
    assert predicate["result"] == "PASSED"
    assert set(predicate["passedTests"]) == {
        "nf4/spectral", "nf4/histogram", "int8/spectral", "int8/histogram", "outliers", "coverage",
    }  # fmt: skip
    results, setting = predicate["configuration"]
    assert results["digest"]["sha256"] == hashlib.sha256(report_text(report).encode()).hexdigest()
    assert results["annotations"]["pValues"].keys() == {*predicate["passedTests"]} - {"coverage"}
    assert setting["annotations"]["seed"] == "3"


def test_an_attacked_scan_fails_and_names_the_test(tmp_path: Path) -> None:
    report, predicate = scan(attacked_folder(tmp_path / "m"), "nf4", "int8")
    assert report.verdict == "attacked"
    assert predicate["result"] == "FAILED"
    assert predicate["failedTests"]
    assert all(name.startswith("nf4/") for name in predicate["failedTests"])
    assert "int8/spectral" in predicate["passedTests"]


def test_an_incomplete_scan_passes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    tensors = {"a.weight": torch.full((64, 64), float("nan")), "b.weight": random_weight(0)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    report, predicate = scan(folder, "nf4")
    assert report.verdict == "incomplete"
    assert predicate["result"] == "WARNED"
    assert predicate["passedTests"] == []
    assert "coverage" in predicate["warnedTests"]


def test_a_scan_on_its_own_grid_did_not_test_that_format(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path / "m", torch.float32)
    grid, tensors = get_grid("nf4"), load_file(folder / "model.safetensors")
    on_grid = {n: rounded(w, grid).contiguous() if n.endswith("proj.weight") else w for n, w in tensors.items()}
    save_file(on_grid, folder / "model.safetensors")
    report, predicate = scan(folder, "nf4", "int8")
    assert report.verdict == "clean"
    assert predicate["result"] == "WARNED"
    assert {"nf4/spectral", "nf4/histogram"} <= set(predicate["warnedTests"])
    assert "nf4/spectral" not in predicate["configuration"][0]["annotations"]["pValues"]
    assert {"int8/spectral", "outliers"} <= set(predicate["passedTests"])


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({}, "PASSED"),
        ({"differs": True, "ratio": 9.0, "p_value": 1e-6}, "FAILED"),
        ({"ratio": float("nan")}, "WARNED"),
        ({"ratio": float("inf")}, "WARNED"),
        ({"num_tokens": 0}, "WARNED"),
        ({"num_targets": 0}, "WARNED"),
    ],
)
def test_a_difference_passes_only_what_was_measured(changes: dict[str, object], result: str) -> None:
    report = difference(**changes)
    predicate = attest(report, MODEL)["predicate"]
    assert predicate["result"] == result
    assert bool(predicate["passedTests"]) == (result == "PASSED")
    assert predicate["configuration"][0]["digest"]["sha256"] == report_sha256(report)
    assert predicate["configuration"][1]["annotations"]["seed"] == "4611686018427387905"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda made: made.update(subject=[]),
        lambda made: made["subject"][0].update(digest={"sha256": "abc"}),
        lambda made: made.update(predicateType="https://example.com/other"),
        lambda made: made["predicate"].update(extra=1),
        lambda made: made["predicate"].pop("properties"),
        lambda made: made["predicate"]["verifier"].pop("policies"),
        lambda made: made["predicate"].update(timeCreated="yesterday"),
    ],
)
def test_the_validation_refuses_what_the_schema_does_not_have(spoil: object) -> None:
    made = attest(verification(), MODEL)
    spoil(made)
    with pytest.raises(CheckpointError, match="does not follow in-toto's schema"):
        intoto.validate(made)


def test_a_file_of_claims_grows_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    made = [attest(verification(), MODEL), attest(difference(), MODEL)]
    intoto.require_appendable(path)
    for one in made:
        intoto.append(path, [one])
        intoto.require_appendable(path)
    assert intoto.read_statements(path) == made
    assert [json.loads(line) for line in path.read_text().splitlines()] == made


@pytest.mark.parametrize(
    "content",
    [
        "{}\n",
        "junk\n",
        '{"_type": "https://in-toto.io/Statement/v1"}',
        '{"_type": "https://in-toto.io/Statement/v1"}\n',
        "\n",
        "[" * 9999,
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError):
        intoto.require_appendable(path)
    assert path.read_text(encoding="utf-8") == content


def test_the_subject_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    made = attest(scan_model(path, ["nf4"], seed=3), path)
    assert made["subject"] == [
        {"name": "model.safetensors", "digest": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    ]
    assert subject_of(folder).sha256 != made["subject"][0]["digest"]["sha256"]
