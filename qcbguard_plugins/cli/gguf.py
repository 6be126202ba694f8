"""``qcbguard gguf``: a guarded copy of a GGUF file."""

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
from qcbguard_plugins.cli.output import json_option, print_report
from qcbguard_plugins.errors import UnguardableError, UsageError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("gguf")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--for", "recipe", required=True, help="What llama-quantize will be given: Q4_K_M, Q8_0, ...")
@guard_options("stochastic", "A defense that needs no data.")
@max_memory_option
@gguf_options
@click.option("--dry-run", is_flag=True, help="Print the type of every tensor, memory and time, and stop.")
@attest_option
@json_option
def command(
    source: Path,
    out: Path | None,
    recipe: str,
    method: str,
    parameters: tuple[str, ...],
    seed: int | None,
    ignore: tuple[str, ...],
    budget_bytes: int | None,
    dry_run: bool,
    attest_path: Path | None,
    json_target: str | None,
    **gguf: Any,
) -> int:
    """Guard SOURCE, a GGUF file in F32, F16 or BF16, into the new file OUT; then run llama-quantize on OUT."""
    from qcbguard_plugins.cli.render.text import render_guard, render_plan
    from qcbguard_plugins.defenses import get_defense
    from qcbguard_plugins.pipeline.budget import plan_gguf_memory
    from qcbguard_plugins.pipeline.estimate import describe_plan
    from qcbguard_plugins.pipeline.gguf_guard import guard_planned_gguf, require_data_free
    from qcbguard_plugins.pipeline.gguf_plan import make_gguf_plan
    from qcbguard_plugins.pipeline.settings import Guard

    if out is None and not dry_run:
        raise UsageError("OUT is missing", remedy="Name the file to make, or use --dry-run.")
    options = read_gguf_options(gguf)
    recipe = recipe.removeprefix("gguf:")
    guard = Guard(get_defense(method, **parse_parameters(parameters)), seed=seed)
    require_data_free(guard)
    plan = make_gguf_plan(source, recipe, options, ignore=ignore)
    if out is None or dry_run:
        planned = describe_plan(plan, guard, lambda: plan_gguf_memory(plan, budget_bytes))
        print_report(planned, render_plan(planned), json_target)
        return 0
    attestation = Attestation(attest_path, source, out)
    with progress_bar(plan.num_weights, f"guarding for {recipe}") as progress:
        report = guard_planned_gguf(plan, out, guard, progress=progress, budget_bytes=budget_bytes)
    print_report(report, render_guard(report), json_target)
    attestation.add(report)
    return UnguardableError.exit_code if report.unguarded else 0
