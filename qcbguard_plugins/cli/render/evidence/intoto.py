"""in-toto Statements: their envelope, their validation, and the file that holds one a line.

References:
    in-toto Attestation Framework v1; predicates SLSA Provenance v1, Test Result v0.1, Simple Verification Result v0.2.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from qcbguard_plugins.checkpoint.subject import Subject
from qcbguard_plugins.errors import CheckpointError, MissingDependencyError, UsageError

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PROVENANCE: Final = "https://slsa.dev/provenance/v1"
TEST_RESULT: Final = "https://in-toto.io/attestation/test-result/v0.1"
VERIFICATION: Final = "https://in-toto.io/attestation/svr/v0.2"

_RESULTS = {"PASSED", "WARNED", "FAILED"}
_SHA256 = re.compile(r"[0-9a-f]{64}")

Statement = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class _Verifier(_Strict):
    id: str
    policies: list[dict[str, Any]]


class _Verification(_Strict):
    """Simple Verification Result v0.2, of which in-toto publishes no schema for machines: by the text of its page."""

    verifier: _Verifier
    timeCreated: AwareDatetime  # noqa: N815
    properties: list[str]


def require_intoto() -> None:
    """Fail where statements cannot be validated.

    Raises:
        MissingDependencyError: ``in-toto-attestation`` is missing.
    """
    try:
        import in_toto_attestation.v1.statement  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"attestations need in-toto-attestation: {error}", remedy="pip install 'qcbguard-plugins[evidence]'"
        ) from error


def statement(subject: Subject, predicate_type: str, predicate: Mapping[str, Any]) -> Statement:
    """A validated statement about a model.

    Raises:
        MissingDependencyError: ``in-toto-attestation`` is missing.
        CheckpointError: What would be claimed does not follow the published schema.
    """
    made = {
        "_type": STATEMENT,
        "subject": [{"name": subject.name, "digest": {"sha256": subject.sha256}}],
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }
    validate(made)
    return made


def validate(made: Statement) -> None:
    """Parse a statement with in-toto's published messages, which refuse unknown and misspelled fields.

    Raises:
        MissingDependencyError: ``in-toto-attestation`` is missing.
        CheckpointError: It does not follow the schema.
    """
    require_intoto()
    from google.protobuf import json_format

    try:
        _validate_envelope(made)
        _validate_predicate(made["predicateType"], made["predicate"])
    except (json_format.ParseError, ValidationError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the statement does not follow in-toto's schema: {error}") from error


def _validate_envelope(made: Statement) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement as intoto
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    intoto.Statement.copy_from_pb(json_format.ParseDict(made, Message())).validate()
    for subject in made["subject"]:
        if not _SHA256.fullmatch(subject["digest"]["sha256"]):
            raise ValueError(f"{subject['digest']} is no SHA-256")


def _validate_predicate(kind: str, predicate: dict[str, Any]) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult
    from in_toto_attestation.v1.resource_descriptor_pb2 import ResourceDescriptor

    if kind == PROVENANCE:
        provenance = json_format.ParseDict(predicate, Provenance())
        if not provenance.build_definition.build_type or not provenance.run_details.builder.id:
            raise ValueError("buildType and builder.id are required")
    elif kind == TEST_RESULT:
        json_format.ParseDict(predicate, TestResult())
        if predicate["result"] not in _RESULTS or not isinstance(predicate["configuration"], list):
            raise ValueError(f"{predicate['result']!r} is no result")
    elif kind == VERIFICATION:
        for policy in _Verification.model_validate(predicate).verifier.policies:
            json_format.ParseDict(policy, ResourceDescriptor())
    else:
        raise ValueError(f"{kind} is none of the predicates that are written here")


def to_line(made: Statement) -> str:
    """A statement as JSON on one line, with its line break."""
    return json.dumps(made, allow_nan=False, separators=(",", ":")) + "\n"


def read_statements(path: Path) -> list[Statement]:
    """The statements of a file that holds one a line, of whatever predicate.

    Raises:
        MissingDependencyError: ``in-toto-attestation`` is missing.
        CheckpointError: It cannot be read, or a line is no in-toto Statement v1; a signed one is not looked into.
    """
    require_intoto()
    from google.protobuf import json_format

    statements: list[Statement] = []
    text = _read(path)
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            made = json.loads(line)
            if not isinstance(made, dict) or made.get("_type") != STATEMENT:
                raise ValueError("it is not an in-toto Statement v1")
            _validate_envelope(made)
        except (json_format.ParseError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path.name}, line {number}: {error}",
                remedy="Give the file that --attest wrote, before it was signed.",
            ) from error
        statements.append(made)
    return statements


def append(path: Path, made: Sequence[Statement]) -> None:
    """Add statements at the end of a file, which is made where there is none.

    Raises:
        UsageError: It cannot be written.
    """
    text = "".join(map(to_line, made)).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "ab", buffering=0) as file:
            file.write(text)
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def require_appendable(path: Path, made: Path | None = None) -> None:
    """Refuse a file that holds anything but statements, before any work is done.

    Args:
        path: The file.
        made: A folder that will exist by then.

    Raises:
        CheckpointError: It holds something else.
        UsageError: It cannot be a file.
    """
    if path.exists():
        if _read(path) and not _read(path).endswith("\n"):
            raise CheckpointError(f"{path} does not end with a line break", remedy="Name another file.")
        read_statements(path)
    elif not path.absolute().parent.is_dir() and (made is None or path.absolute().parent != made.absolute()):
        raise UsageError(f"{path} cannot be written: {path.absolute().parent} does not exist")


def moved(made: Statement, before: str, after: str) -> Statement:
    """A statement with another digest of its subject, where that is the one it has."""
    if [subject["digest"] for subject in made["subject"]] != [{"sha256": before}]:
        return made
    return made | {"subject": [subject | {"digest": {"sha256": after}} for subject in made["subject"]]}


def timestamp(created: str) -> str:
    """A report's time as in-toto writes it: RFC 3339 in UTC, with a ``Z``."""
    return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
