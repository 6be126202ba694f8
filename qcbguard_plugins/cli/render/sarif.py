"""A scan as SARIF 2.1.0, which code-scanning dashboards read.

References:
    OASIS, Static Analysis Results Interchange Format version 2.1.0.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from qcbguard_plugins.cli.render.advice import explanation, headline, next_steps, printable
from qcbguard_plugins.cli.render.scan_text import worst_tensors
from qcbguard_plugins.detection.weights.report import ScanReport

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES = {
    "QCB001": (
        "QuantizationConditionedBackdoor",
        "The rounding error of a stock quantizer carries a hidden fine-tune.",
        "error",
    ),
    "QCB002": (
        "OutlierInjection",
        "Planted outliers make a stock quantizer wipe out the rest of their chunks.",
        "error",
    ),
    "QCB003": ("NotTested", "A tensor that a stock quantizer would round could not be tested.", "warning"),
    "QCB004": ("OtherWeights", "Another weight file of the folder was not tested.", "warning"),
}


def to_sarif(report: ScanReport) -> dict[str, Any]:
    """The report as a SARIF log, ready for ``json.dumps``."""
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": _driver(report)},
                "invocations": [{"executionSuccessful": True, "exitCode": report.exit_code}],
                "results": _results(report),
                "properties": {"verdict": report.verdict, "coverage": report.coverage, "seed": str(report.seed)},
            }
        ],
    }


def _driver(report: ScanReport) -> dict[str, Any]:
    rules = [
        {
            "id": id_,
            "name": name,
            "shortDescription": {"text": text},
            "defaultConfiguration": {"level": level},
            "help": {"text": " ".join(f"{sentence} {command}".strip() for sentence, command in next_steps(report))},
        }
        for id_, (name, text, level) in _RULES.items()
    ]
    return {"name": "qcbguard", "semanticVersion": report.versions.get("qcbguard-plugins", "0.0.0"), "rules": rules}


def _results(report: ScanReport) -> list[dict[str, Any]]:
    results = [
        _result(
            report, "QCB001", f"{headline(report)}. {explanation(report)}", _names(report, f.format), p_value=f.p_value
        )
        for f in report.formats
        if f.attacked
    ]
    if report.outlier_p <= report.alpha:
        names = [tensor.name for tensor in report.tensors if tensor.outlier_p <= report.alpha]
        results.append(_result(report, "QCB002", explanation(report), names, p_value=report.outlier_p))
    results += [
        _result(report, "QCB003", f"{printable(skipped.name)}: {skipped.reason}", [skipped.name])
        for skipped in report.skipped
    ]
    results += [
        _result(report, "QCB004", f"{printable(file.name)}: {file.taken_by}", []) for file in report.untested_files
    ]
    return results


def _names(report: ScanReport, format: str) -> list[str]:
    return [evidence.name for evidence in worst_tensors(report, 20) if evidence.format == format]


def _result(report: ScanReport, rule: str, text: str, tensors: list[str], **properties: float) -> dict[str, Any]:
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": quote(report.model)}}}
    if tensors:
        location["logicalLocations"] = [{"fullyQualifiedName": printable(name), "kind": "tensor"} for name in tensors]
    return {
        "ruleId": rule,
        "ruleIndex": list(_RULES).index(rule),
        "level": _RULES[rule][2],
        "message": {"text": text},
        "locations": [location],
        "properties": properties,
    }
