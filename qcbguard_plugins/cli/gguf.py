"""``qcbguard gguf``: a guarded copy of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcbguard_plugins.cli.options import (
    gguf_options,
    guard_options,
    max_memory_option,
    parse_parameters,
    read_gguf_options,
)
from qcbguard_plugins.cli.output import json_option, print_report, progress_bar
from qcbguard_plugins.errors import UnguardableError


@click.command("gguf")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--for", "recipe", required=True, help="What llama-quantize will be given: Q4_K_M, Q8_0, ...")
@guard_options("stochastic", "A defense that needs no data.")
@max_memory_option
@gguf_options
@json_option
def command(
    source: Path,
    out: Path,
    recipe: str,
    method: str,
    parameters: tuple[str, ...],
    seed: int | None,
    ignore: tuple[str, ...],
    budget_bytes: int | None,
    json_target: str | None,
    **gguf: Any,
) -> int:
    """Guard SOURCE, a GGUF file in F32, F16 or BF16, into the new file OUT; then run llama-quantize on OUT."""
    from qcbguard_plugins.backends.gguf.file import guard_planned_gguf, require_data_free
    from qcbguard_plugins.backends.gguf.plan import make_gguf_plan
    from qcbguard_plugins.defenses import get_defense
    from qcbguard_plugins.guard import Guard
    from qcbguard_plugins.report.text import render_guard

    options = read_gguf_options(gguf)
    recipe = recipe.removeprefix("gguf:")
    guard = Guard(get_defense(method, **parse_parameters(parameters)), seed=seed)
    require_data_free(guard)
    plan = make_gguf_plan(source, recipe, options, ignore=ignore)
    with progress_bar(plan.num_weights, f"guarding for {recipe}") as progress:
        report = guard_planned_gguf(plan, out, guard, progress=progress, budget_bytes=budget_bytes)
    print_report(report, render_guard(report), json_target)
    return UnguardableError.exit_code if report.unguarded else 0
