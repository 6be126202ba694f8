"""What reports say about a folder, in sentences: for a model card and for the annotations of a bill of materials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from qcbguard_plugins._util.records import DISTRIBUTION
from qcbguard_plugins.checkpoint.manifest import (
    MANIFEST_FILE,
    GuardReport,
    VerifyReport,
    read_manifest,
)
from qcbguard_plugins.checkpoint.subject import Subject, subject_of
from qcbguard_plugins.cli.render.advice import explanation, headline, printable
from qcbguard_plugins.cli.render.diff_text import diff_explanation, diff_headline
from qcbguard_plugins.cli.render.evidence.intoto import Statement, read_statements
from qcbguard_plugins.cli.render.evidence.statements import (
    attest,
    nothing_to_test,
    report_text,
    require_files,
)
from qcbguard_plugins.detection.behaviour.report import DiffReport
from qcbguard_plugins.detection.weights.report import ScanReport
from qcbguard_plugins.errors import CheckpointError, UsageError

_MAX_NAMES = 20

Measured = VerifyReport | ScanReport | DiffReport
_KINDS: dict[str, type[Measured]] = {"verify": VerifyReport, "scan": ScanReport, "diff": DiffReport}


@dataclass(frozen=True)
class Evidence:
    """A guarded folder, and what was measured on it.

    Attributes:
        folder: The folder.
        subject: Its digests.
        guard: Its manifest.
        reports: Reports about these very bytes.
        statements: The claims that bind the reports to them.
    """

    folder: Path
    subject: Subject
    guard: GuardReport
    reports: tuple[Measured, ...] = ()
    statements: tuple[Statement, ...] = ()


def collect_evidence(folder: Path, report_paths: Sequence[Path] = (), claims_path: Path | None = None) -> Evidence:
    """Read a guarded folder and reports about it, and check that they belong together.

    A report counts only if a claim binds it to the folder's digest: one that ``--attest`` wrote when it was made.

    Args:
        folder: A folder that ``qcbguard guard`` made.
        report_paths: JSON reports of verify, scan and diff.
        claims_path: The file that ``--attest`` wrote.

    Raises:
        UsageError: There are reports and no claims.
        CheckpointError: The folder's weights are not those of its manifest, or a report is not about its bytes.
    """
    if report_paths and claims_path is None:
        raise UsageError(
            "a report alone does not say which bytes it is about",
            remedy="Add --claims FILE, which --attest wrote when the report was made.",
        )
    guard = read_manifest(folder)
    subject = subject_of(folder)
    require_files(subject, guard.files)
    statements = () if claims_path is None else tuple(read_statements(claims_path))
    reports = tuple(_read_report(path) for path in report_paths)
    for path, report in zip(report_paths, reports, strict=True):
        if attest(report, subject) not in statements:
            raise CheckpointError(
                f"no claim binds {path.name} to {folder}: another report, or the folder changed since",
                remedy=f"Run 'qcbguard {report.kind}' again with --json and --attest.",
            )
    return Evidence(folder, subject, guard, reports, statements)


def guard_sentences(report: GuardReport) -> list[str]:
    """What was guarded, how, and what was not."""
    version = report.versions.get(DISTRIBUTION, "of an unknown version")
    sentences = [
        f"{report.coverage} for {', '.join(report.formats)} with {report.method}, seed {report.seed}, by "
        f"{DISTRIBUTION} {version} on {report.created}.",
        f"{report.share_moved:.1%} of the guarded weights get another code than plain rounding would give them.",
    ]
    if report.unguarded:
        sentences.append(f"NOT guarded: {listed(report.unguarded)}.")
    if report.uncovered:
        sentences.append(f"NOT covered: {listed([tensor.key for tensor in report.uncovered])}.")
    if report.purification is not None:
        changed = "" if report.purification.weights_as_purified else "; its weights were changed between"
        sentences.append(f"Purified before, on {report.purification.created}{changed}.")
    return sentences


def measured_sentences(report: Measured) -> list[str]:
    """The result of one report, with its coverage and what it rests on."""
    if isinstance(report, VerifyReport):
        return _verify_sentences(report)
    if isinstance(report, ScanReport):
        result = [f"{headline(report)}.", explanation(report), *_on_grid(report)]
    else:
        result = [f"{diff_headline(report)}.", diff_explanation(report)]
    return [*result, f"{report.coverage}; seed {report.seed}."]


def _on_grid(report: ScanReport) -> list[str]:
    formats = listed([evidence.format for evidence in report.formats if nothing_to_test(report, evidence)])
    return [f"On the grid of {formats} already, which leaves nothing to test there."] if formats else []


def listed(names: Sequence[str]) -> str:
    """Names with commas between them, the first twenty of many."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(printable(name) for name in names[:_MAX_NAMES]) + more


def _verify_sentences(report: VerifyReport) -> list[str]:
    sentences = [
        f"The stock quantizer for {', '.join(report.formats)} stores the planned codes of "
        f"{report.num_tensors_as_planned} of {len(report.tensors)} guarded tensors."
    ]
    others = [tensor.name for tensor in report.tensors if not tensor.as_planned]
    if others:
        sentences.append(f"OTHER CODES than planned: {listed(others)}.")
    if report.changed_files:
        sentences.append(f"CHANGED since it was guarded: {listed(report.changed_files)}.")
    if report.unguarded:
        sentences.append(f"NOT guarded, so nothing is said about them: {listed(report.unguarded)}.")
    if report.uncovered:
        sentences.append(f"NOT covered: {listed([tensor.key for tensor in report.uncovered])}.")
    return sentences


def _read_report(path: Path) -> Measured:
    """A report as ``--json`` wrote it.

    Raises:
        CheckpointError: It is none.
    """

    class Kind(BaseModel):
        kind: str = ""

    try:
        data = path.read_bytes()
        kind = Kind.model_validate_json(data).kind
        if kind not in _KINDS:
            raise CheckpointError(
                f"{path.name} is no report of verify, scan or diff" + (f" but of {kind}" if kind else ""),
                remedy=f"What was guarded stands in {MANIFEST_FILE} already." if kind == "guard" else "",
            )
        report = _KINDS[kind].model_validate_json(data)
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} is not a valid report: {error}") from error
    if report_text(report).encode() != data:
        raise CheckpointError(f"{path.name} is not as --json wrote it", remedy="Give the file as it was written.")
    return report
