"""``--attest``, and what the verbs that render evidence share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcbguard_plugins.errors import UsageError

if TYPE_CHECKING:
    from qcbguard_plugins.cli.render.evidence.statements import Report

attest_option = click.option(
    "--attest",
    "attest_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Add what was found to this file as an in-toto statement, one a line, unsigned.",
)

_EVIDENCE = (
    click.option(
        "--report",
        "report_paths",
        type=click.Path(path_type=Path),
        multiple=True,
        help="JSON report of verify, scan or diff on DIR (repeatable).",
    ),
    click.option(
        "--claims",
        "claims_path",
        type=click.Path(path_type=Path),
        help="The file that --attest wrote with those reports: it binds them to DIR.",
    ),
    click.option("--base-model", default="", metavar="NAME", help="Name of the base on the hub, in its letter case."),
)


def evidence_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that renders evidence about a folder."""
    for option in reversed(_EVIDENCE):
        command = option(command)
    return command


class Attestation:
    """The statement that a verb will add, with everything that can be refused refused before the work.

    Args:
        path: The file of ``--attest``; without one nothing is done.
        read: What the verb reads. It must not change until the statement is made.
        made: What the verb will write, if the statement is about that.

    Raises:
        UsageError: The file lies where it would change what it is about.
        CheckpointError: The file holds something other than statements.
        MissingDependencyError: ``in-toto-attestation`` is missing.
    """

    def __init__(self, path: Path | None, read: Path, made: Path | None = None) -> None:
        self._path, self._made = path, made
        if path is None:
            return
        from qcbguard_plugins.checkpoint.subject import Observed
        from qcbguard_plugins.cli.render.evidence.intoto import require_appendable, require_intoto
        from qcbguard_plugins.cli.render.evidence.statements import whole_model

        read = whole_model(read)
        require_intoto()
        self._observed = Observed(read)
        for model in (read, *([] if made is None else [made])):
            _require_outside(path, model)
        require_appendable(path, made)

    def add(self, report: Report, plan: Path | None = None) -> None:
        """Add the statement of a report.

        Args:
            report: What the verb found.
            plan: Where the plan of a verification is, if not in what it read.

        Raises:
            CheckpointError: What the verb read or wrote changed since.
        """
        if self._path is None:
            return
        from qcbguard_plugins.cli.render.evidence.intoto import append
        from qcbguard_plugins.cli.render.evidence.statements import attest

        source = self._observed.subject()
        if self._made is None:
            statement = attest(report, source, plan=plan or self._observed.path)
        else:
            statement = attest(report, self._made, base=source)
        append(self._path, [statement])


def replace_file(path: Path, data: bytes) -> None:
    """Give a file another content, whole or not at all; its permissions stay.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _require_outside(path: Path, model: Path) -> None:
    """Refuse a file in the folder that it is about, except the one whose name says that it is no part of the model."""
    from qcbguard_plugins.checkpoint.subject import CLAIMS_FILE

    target, folder = path.absolute(), model.absolute()
    inside = target.resolve().is_relative_to(folder.resolve())
    if inside and target.resolve() != folder.resolve() / CLAIMS_FILE:
        raise UsageError(
            f"{path} lies in {model} and would change its digest",
            remedy=f"Name a file elsewhere, or {CLAIMS_FILE} in the folder, which is not counted.",
        )
