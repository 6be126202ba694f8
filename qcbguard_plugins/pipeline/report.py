"""The report of a guard, whatever was guarded."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.checkpoint.folder_record import FolderRecord
from qcbguard_plugins.checkpoint.manifest import FileRecord, GuardReport, PurificationNote, TensorRecord
from qcbguard_plugins.pipeline.plan import Plan
from qcbguard_plugins.pipeline.settings import Guard


def report_of(
    plan: Plan,
    guard: Guard,
    records: Sequence[TensorRecord],
    started: float,
    *,
    files: Sequence[FileRecord] = (),
    left_out: Sequence[str] = (),
    folder: FolderRecord | None = None,
    purification: PurificationNote | None = None,
) -> GuardReport:
    """Make the report of a run.

    Args:
        plan: What was to be guarded.
        guard: The method, its seed drawn.
        records: What was guarded, in any order; the report has the order of the plan.
        started: When the run began, by :func:`time.monotonic`.
        files: The weight files before and after.
        left_out: Files of the source that were not carried along.
        folder: What else the folder that was made holds.
        purification: What is known of a purification before it.
    """
    by_name = {record.name: record for record in records}
    return GuardReport(
        versions=versions(),
        source=plan.source,
        formats=plan.formats,
        **guard.describe(),
        tensors=tuple(by_name[target.name] for target in plan.targets),
        unguarded=plan.ignored,
        uncovered=plan.uncovered,
        files=tuple(files),
        folder=folder,
        left_out=tuple(left_out),
        toolchain=plan.all_facts(),
        purification=purification,
        elapsed_s=time.monotonic() - started,
    )
