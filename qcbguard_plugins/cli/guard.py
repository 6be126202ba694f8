"""``qcbguard guard``: a guarded copy of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcbguard_plugins.cli.evidence import Attestation, attest_option
from qcbguard_plugins.cli.options import (
    gguf_options,
    guard_options,
    max_memory_option,
    parse_parameters,
    read_gguf_options,
)
from qcbguard_plugins.cli.output import json_option, print_report, quieten_libraries
from qcbguard_plugins.errors import UnguardableError, UsageError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("guard")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "formats",
    required=True,
    help="Formats that the model will be quantized to, with commas: nf4, fp4, int8, gguf:Q4_K_M, ...",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make; it must not exist.")
@guard_options("feedback", "Defense; see 'qcbguard list'.")
@click.option(
    "--calibration",
    default="auto",
    show_default=True,
    help="builtin, self (the model writes), auto, or the path of a .txt or .jsonl file.",
)
@max_memory_option
@click.option("--dry-run", is_flag=True, help="Print the plan, its memory and its time, and stop.")
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "bf16"]),
    default="f32",
    show_default=True,
    help="For a GGUF format: the --outtype of the conversion.",
)
@gguf_options
@attest_option
@json_option
def command(
    model: Path,
    formats: str,
    out: Path | None,
    method: str,
    parameters: tuple[str, ...],
    seed: int | None,
    calibration: str,
    ignore: tuple[str, ...],
    budget_bytes: int | None,
    dry_run: bool,
    attest_path: Path | None,
    json_target: str | None,
    **gguf: Any,
) -> int:
    """Guard MODEL, the folder of a full-precision checkpoint, into a new folder that takes its place."""
    from qcbguard_plugins._util.distributed import join_process_group
    from qcbguard_plugins.backends.ggml.backend import Ggml
    from qcbguard_plugins.cli.render.text import render_guard, render_plan
    from qcbguard_plugins.defenses import get_defense
    from qcbguard_plugins.models.calibration import Calibration
    from qcbguard_plugins.pipeline.budget import plan_memory
    from qcbguard_plugins.pipeline.estimate import describe_plan
    from qcbguard_plugins.pipeline.guard import guard_planned
    from qcbguard_plugins.pipeline.plan import make_plan
    from qcbguard_plugins.pipeline.settings import Guard

    source = (
        Calibration(source=calibration)
        if calibration in ("auto", "builtin", "self")
        else Calibration(texts=calibration)
    )
    guard = Guard(get_defense(method, **parse_parameters(parameters)), seed=seed, calibration=source)
    if out is None and not dry_run:
        raise UsageError("--out is missing", remedy="Name the folder to make, or use --dry-run.")
    quieten_libraries()
    plan = make_plan(model, formats, ignore=ignore, backends=[Ggml(read_gguf_options(gguf))])
    if out is None or dry_run:
        planned = describe_plan(plan, guard, lambda: plan_memory(plan, guard, budget_bytes))
        print_report(planned, render_plan(planned), json_target)
        return 0
    group = join_process_group()
    attestation = Attestation(attest_path if group.rank == 0 else None, model, out)
    with progress_bar(
        plan.num_weights // group.world_size, f"guarding for {formats}", shown=group.rank == 0
    ) as progress:
        result = guard_planned(plan, out, guard, progress=progress, group=group, budget_bytes=budget_bytes)
    if group.rank > 0:
        return 0  # the first process has the report, and the exit code
    print_report(result, render_guard(result), json_target)
    attestation.add(result)
    return 0 if result.is_complete else UnguardableError.exit_code
