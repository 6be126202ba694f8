"""What each report claims, as an in-toto statement.

Nothing is claimed that a report does not say. A finding is a failed test or a property that is missing; what could not
be tested is never among what passed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from qcbguard_plugins._util.records import DISTRIBUTION
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, FileRecord, GuardReport, VerifyReport, read_manifest
from qcbguard_plugins.checkpoint.provenance import GGUF_PROVENANCE_KEY
from qcbguard_plugins.checkpoint.purification_note import PURIFICATION_FILE
from qcbguard_plugins.checkpoint.subject import Subject, subject_of
from qcbguard_plugins.cli.render.evidence.intoto import (
    PROVENANCE,
    TEST_RESULT,
    VERIFICATION,
    Statement,
    statement,
    timestamp,
)
from qcbguard_plugins.detection.behaviour.report import DiffReport
from qcbguard_plugins.detection.weights.report import FormatEvidence, ScanReport
from qcbguard_plugins.errors import CheckpointError, UsageError
from qcbguard_plugins.purification.report import PurifyReport

Report = GuardReport | PurifyReport | VerifyReport | ScanReport | DiffReport

#: The property of a verification in which every tensor of the plan was guarded and is stored as planned.
AS_PLANNED: Final = "QCBGUARD_CODES_AS_PLANNED"
_PURL: Final = f"pkg:pypi/{DISTRIBUTION}"


def attest(
    report: Report,
    path: Path | str | Subject,
    *,
    base: Path | str | Subject | None = None,
    plan: Path | str | None = None,
) -> Statement:
    """The in-toto Statement v1 of a report, validated, ready for ``json.dumps`` and for signing.

    SLSA Provenance for a guard and a purification, Test Result for a scan and a diff, Simple Verification Result for a
    verification.

    Args:
        report: What a run returned.
        path: What the report is about: what a guard or purification made, or what was scanned, compared or verified.
            For an ONNX file the statement is about its folder.
        base: What a guard or purification read. Required for a GGUF file, whose report does not hash its source.
        plan: For a verification of a quantized model: where the plan is, if not in the model itself.

    Raises:
        UsageError: ``base`` or the plan is missing.
        CheckpointError: ``path`` or ``base`` is not what the report says it was.
        MissingDependencyError: ``in-toto-attestation`` is missing.
    """
    subject = _as_subject(path)
    if isinstance(report, GuardReport | PurifyReport):
        return statement(subject, PROVENANCE, _provenance(report, subject, None if base is None else _as_subject(base)))
    if isinstance(report, VerifyReport):
        _require_name(report.folder, subject)
        location = None if isinstance(path, Subject) else whole_model(Path(path))
        policy = _policy(subject, location, plan)
        if report.clean and location is not None and plan is None and MANIFEST_FILE in subject.files:
            require_files(subject, read_manifest(location).files)
        return statement(subject, VERIFICATION, _verification(report, policy))
    _require_name(report.model, subject)
    return statement(subject, TEST_RESULT, _scan(report) if isinstance(report, ScanReport) else _diff(report))


def whole_model(path: Path) -> Path:
    """What must be hashed for a model: of an ONNX file its folder, since it may keep its weights in other files."""
    return path.parent if path.suffix == ".onnx" else path


def report_text(report: BaseModel) -> str:
    """A report as ``--json`` writes it into a file."""
    return report.model_dump_json(indent=2) + "\n"


def report_sha256(report: BaseModel) -> str:
    """SHA-256 of the file that ``--json`` writes."""
    return hashlib.sha256(report_text(report).encode()).hexdigest()


def require_files(subject: Subject, files: tuple[FileRecord, ...], *, before: bool = False) -> None:
    """Check that a folder holds the weight files of a report.

    Args:
        subject: The folder.
        files: What the report says of them.
        before: Compare with what was read instead of what was written.

    Raises:
        CheckpointError: A file is missing or another one.
    """
    recorded = {file.name: file.sha256_in if before else file.sha256_out for file in files}
    changed = [name for name, digest in recorded.items() if digest and subject.files.get(name) != digest]
    if changed:
        raise CheckpointError(
            f"{subject.name} is not what the report is about: its weights are others", details=changed
        )


def _require_name(name: str, subject: Subject) -> None:
    if name and name != subject.name and name not in subject.files:
        raise CheckpointError(f"the report is about {name}, and not about {subject.name}")


def _as_subject(path: Path | str | Subject) -> Subject:
    return path if isinstance(path, Subject) else subject_of(whole_model(Path(path)))


def _provenance(report: GuardReport | PurifyReport, subject: Subject, base: Subject | None) -> dict[str, Any]:
    manifest = MANIFEST_FILE if isinstance(report, GuardReport) else PURIFICATION_FILE
    digest = report_sha256(report)
    byproduct = {"name": manifest, "digest": {"sha256": digest}}
    if report.files:
        require_files(subject, report.files)
        if subject.files.get(manifest) != digest:
            raise CheckpointError(f"{manifest} of {subject.name} is another one than the report")
    elif base is None:
        raise UsageError("the report does not hash what was read", remedy="Say what it was: base=PATH.")
    external, internal = _parameters(report)
    finished = datetime.fromisoformat(report.created)
    return {
        "buildDefinition": {
            "buildType": f"{_PURL}#{report.kind}/v1",
            "externalParameters": external,
            "internalParameters": internal,
            "resolvedDependencies": _dependencies(report, base),
        },
        "runDetails": {
            "builder": {"id": _PURL, "version": report.versions},
            "metadata": {
                "startedOn": timestamp((finished - timedelta(seconds=report.elapsed_s)).isoformat()),
                "finishedOn": timestamp(report.created),
            },
            "byproducts": [byproduct],
        },
    }


def _parameters(report: GuardReport | PurifyReport) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was asked for, and what else the outcome depends on; a seed is text, for it may exceed a JSON number."""
    if isinstance(report, PurifyReport):
        config = {name: str(value) if name == "seed" else value for name, value in report.config.items()}
        under = {"baseWeightsSha256": report.base_sha256} if report.base_sha256 else {}
        return {"mode": report.mode, "config": config}, {"architecture": report.architecture, **under}
    external = {
        "formats": list(report.formats),
        "method": report.method,
        "parameters": report.parameters,
        "seed": str(report.seed),
        "calibration": report.calibration,
        "unguarded": list(report.unguarded),
    }
    uncovered = [tensor.key for tensor in report.uncovered]
    internal = {
        "coverage": report.coverage,
        "uncovered": uncovered,
        "toolchain": report.toolchain,
        "codesSha256": report.codes_sha256,
    }
    return external, internal


def _dependencies(report: GuardReport | PurifyReport, base: Subject | None) -> list[dict[str, Any]]:
    found = []
    if base is not None:
        require_files(base, report.files, before=True)
        found.append(_descriptor(base.name, base.sha256))
    found += [_descriptor(f"{report.source}/{file.name}", file.sha256_in) for file in report.files if file.sha256_in]
    if isinstance(report, PurifyReport):
        found += [_descriptor(data.name, data.sha256) for data in report.clean_data]
    elif report.purification is not None:
        found.append(_descriptor(f"{report.source}/{PURIFICATION_FILE}", report.purification.manifest_sha256))
    return found


def _verification(report: VerifyReport, policy: dict[str, Any]) -> dict[str, Any]:
    whole = bool(report.tensors) and report.clean and report.is_complete
    properties = [AS_PLANNED, *(f"{AS_PLANNED}:{name}" for name in report.formats)] if whole else []
    return {
        "verifier": {"id": f"{_PURL}@{_version(report.versions)}", "policies": [policy]},
        "timeCreated": timestamp(report.created),
        "properties": properties,
    }


def _policy(subject: Subject, location: Path | None, plan: Path | str | None) -> dict[str, Any]:
    """The plan that was verified: a manifest, or what a GGUF file carries in its metadata."""
    place = location if plan is None else Path(plan)
    if plan is None and MANIFEST_FILE in subject.files:
        return _descriptor(MANIFEST_FILE, subject.files[MANIFEST_FILE])
    if place is not None and (place / MANIFEST_FILE).is_file():
        manifest = place / MANIFEST_FILE
        return _descriptor(MANIFEST_FILE, hashlib.sha256(manifest.read_bytes()).hexdigest())
    if place is not None and place.is_file():
        from qcbguard_plugins.checkpoint.gguf_reader import open_gguf

        text = open_gguf(place).metadata.get(GGUF_PROVENANCE_KEY)
        if isinstance(text, str):
            return _descriptor(GGUF_PROVENANCE_KEY, hashlib.sha256(text.encode()).hexdigest())
    raise UsageError(f"{subject.name} carries no plan", remedy="Say where it is: plan=PATH.")


def _scan(report: ScanReport) -> dict[str, Any]:
    names: dict[str, list[str]] = {"passed": [], "warned": [], "failed": []}
    for evidence in report.formats:
        for name, result in _format_results(report, evidence).items():
            names[result].append(f"{evidence.format}/{name}")
    names["failed" if report.outlier_p <= report.alpha else "passed"].append("outliers")
    names["passed" if report.tensors and not report.skipped else "warned"].append("coverage")
    passed, warned, failed = names.values()
    if report.verdict == "incomplete" or not report.tensors:
        warned, passed = passed + warned, []
    if report.verdict == "attacked" and not failed:
        raise CheckpointError("the report says that the model is attacked, and none of its tests does")
    return _test_result(
        report,
        (passed, warned, failed),
        {
            "alpha": report.alpha,
            "seed": str(report.seed),
            "formats": [evidence.format for evidence in report.formats],
            "coverage": report.coverage,
            "onGrid": {evidence.format: evidence.num_on_grid for evidence in report.formats},
            "notTested": [skipped.name for skipped in report.skipped],
        },
        {
            "verdict": report.verdict,
            "pValues": {
                "outliers": report.outlier_p,
                **{
                    f"{evidence.format}/{name}": _corrected(report, p_value)
                    for evidence in report.formats
                    if not nothing_to_test(report, evidence)
                    for name, p_value in _p_values(evidence).items()
                },
            },
        },
    )


def _format_results(report: ScanReport, evidence: FormatEvidence) -> dict[str, str]:
    if nothing_to_test(report, evidence):
        return dict.fromkeys(_p_values(evidence), "warned")
    values = _p_values(evidence)
    least = min(values.values())
    found = {
        name
        for name, value in values.items()
        if evidence.attacked and (value == least or _corrected(report, value) <= report.alpha)
    }
    return {name: "failed" if name in found else "passed" for name in values}


def nothing_to_test(report: ScanReport, evidence: FormatEvidence) -> bool:
    """Whether every tensor lies on a format's grid already, so that its tests were not carried out."""
    return evidence.num_on_grid >= len(report.tensors)


def _p_values(evidence: FormatEvidence) -> dict[str, float]:
    return {"spectral": evidence.spectral.p_value, "histogram": evidence.residual.p_value}


def _corrected(report: ScanReport, p_value: float) -> float:
    """For the number of tests: two a format, and that of outliers."""
    return min(1.0, (2 * len(report.formats) + 1) * p_value)


def _diff(report: DiffReport) -> dict[str, Any]:
    test = f"{report.format}/divergence"
    measured = report.num_tokens > 0 and report.num_targets > 0 and math.isfinite(report.ratio)
    passed = [test] if measured and not report.differs else []
    failed = [test] if report.differs else []
    warned = [] if passed or failed else [test]
    return _test_result(
        report,
        (passed, warned, failed),
        {"format": report.format, "seed": str(report.seed), "coverage": report.coverage},
        {
            "pValues": {test: report.p_value},
            "divergence": report.divergence,
            "ratio": report.ratio if math.isfinite(report.ratio) else str(report.ratio),
            "numWords": len(report.words),
        },
    )


def _test_result(
    report: ScanReport | DiffReport,
    tests: tuple[list[str], list[str], list[str]],
    configuration: Mapping[str, Any],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    passed, warned, failed = tests
    return {
        "result": "FAILED" if failed else "WARNED" if warned else "PASSED",
        "configuration": [
            {
                "name": f"{report.kind}.json",
                "digest": {"sha256": report_sha256(report)},
                "mediaType": "application/json",
                "annotations": {"created": timestamp(report.created), **results},
            },
            {
                "uri": f"{_PURL}@{_version(report.versions)}",
                "name": f"qcbguard {report.kind}",
                "annotations": {"versions": report.versions, **configuration},
            },
        ],
        "passedTests": passed,
        "warnedTests": warned,
        "failedTests": failed,
    }


def _descriptor(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _version(versions: Mapping[str, str]) -> str:
    return versions.get(DISTRIBUTION, "unknown")
