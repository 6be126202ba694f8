"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qcbguard_plugins._util.memory import human_bytes
from qcbguard_plugins.checkpoint.manifest import GuardReport, VerifyReport
from qcbguard_plugins.checkpoint.uncovered import UncoveredTensor, describe_uncovered
from qcbguard_plugins.pipeline.estimate import PlanReport

_MAX_ROWS = 40


def render_plan(report: PlanReport) -> Group:
    """Every target tensor, and what the run will cost."""
    table = _table("tensor", "shape", "dtype", "format", "action")
    for tensor in report.tensors:
        shape, form = _shape(tensor.shape) if tensor.shape else "", ", ".join(tensor.formats)
        table.add_row(tensor.name, shape, tensor.dtype, form, tensor.action)
    lines = [
        f"{report.num_guarded} of {len(report.tensors)} target tensors will be guarded with {report.method}",
        f"peak memory about {human_bytes(report.peak_bytes)}, time about {human_seconds(report.estimated_s)}",
    ]
    lines += _not_covered(report.uncovered)
    if report.types_from:
        lines.append(f"types: {report.types_from}")
    if report.streamed:
        lines.append("the model does not fit into that, and is read block by block")
    return Group(table, Text("\n".join(lines)))


def render_guard(report: GuardReport) -> Group:
    """The tensors that changed most, and the coverage."""
    table = _table("tensor", "shape", "codes moved", "relative change", *report.chosen)
    ranked = sorted(report.tensors, key=lambda tensor: -tensor.num_moved / tensor.num_weights)
    for tensor in ranked[:_MAX_ROWS]:
        moved = f"{tensor.num_moved / tensor.num_weights:.1%}"
        chosen = [str(tensor.chosen.get(name, "")) for name in report.chosen]
        table.add_row(tensor.name, _shape(tensor.shape), moved, f"{tensor.relative_change:.4f}", *chosen)
    lines = []
    if len(ranked) > _MAX_ROWS:
        lines.append(f"... and {len(ranked) - _MAX_ROWS} more tensors, in the report")
    lines += [f"UNGUARDED  {name}" for name in report.unguarded]
    lines += _not_covered(report.uncovered)
    lines += [f"left out, unguarded weights in another form: {name}" for name in report.left_out]
    lines += [f"guarded without data: {len(names)} tensors, {why}" for why, names in report.data_free.items()]
    if report.purification is not None:
        changed = "" if report.purification.weights_as_purified else "; ITS WEIGHTS WERE CHANGED SINCE"
        lines.append(f"purified before, {report.purification.created}{changed}")
    lines.append(
        f"{report.coverage} for {', '.join(report.formats)} with {report.method}; {report.share_moved:.1%} of the "
        f"codes moved; {human_seconds(report.elapsed_s)}"
    )
    return Group(table, Text("\n".join(lines)))


def render_verify(report: VerifyReport) -> Group:
    """What differs from the plan, and the verdict."""
    lines = [f"CHANGED    {problem}" for problem in report.folder_problems or report.changed_files]
    lines += [f"DIFFERS    {tensor.name}  {tensor.reason}" for tensor in report.tensors if not tensor.as_planned]
    lines += [f"UNGUARDED  {name}" for name in report.unguarded]
    lines += _not_covered(report.uncovered)
    planned = f"{report.num_tensors_as_planned} of {len(report.tensors)} guarded tensors"
    share = "" if report.share_as_planned is None else f", {report.share_as_planned:.2%} of all"
    formats = ", ".join(report.formats)
    lines.append(f"{planned}: the stock {formats} quantizer stores the planned codes{share}")
    return Group(Text("\n".join(lines)))


def _not_covered(uncovered: Sequence[UncoveredTensor]) -> list[str]:
    lines = describe_uncovered(uncovered)
    return (
        [*lines, "keep these from every quantizer; experts can be guarded in a GGUF file, with 'qcbguard gguf'"]
        if lines
        else []
    )


def human_seconds(seconds: float) -> str:
    """A duration to about two digits."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
