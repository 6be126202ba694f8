"""``qcbguard convert-hf-to-gguf``: llama.cpp's own conversion, guarded in flight."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from qcbguard_plugins.cli.options import gguf_options, guard_options, parse_parameters, read_gguf_options
from qcbguard_plugins.cli.output import json_option, print_report
from qcbguard_plugins.errors import UnguardableError


@click.command(
    "convert-hf-to-gguf", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--for", "recipe", required=True, help="What llama-quantize will be given: Q4_K_M, Q8_0, ...")
@guard_options("stochastic", "A defense that needs no data.")
@gguf_options
@json_option
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    script: Path,
    arguments: tuple[str, ...],
    recipe: str,
    method: str,
    parameters: tuple[str, ...],
    seed: int | None,
    ignore: tuple[str, ...],
    json_target: str | None,
    **gguf: Any,
) -> int:
    """Run SCRIPT, the convert_hf_to_gguf.py of your llama.cpp, with its own ARGUMENTS, and guard what it writes.

    Options of qcbguard come before SCRIPT.
    """
    from qcbguard_plugins.cli.render.text import render_guard
    from qcbguard_plugins.defenses import get_defense
    from qcbguard_plugins.hooks.llama_cpp import convert_guarded
    from qcbguard_plugins.pipeline.gguf_plan import make_gguf_plan
    from qcbguard_plugins.pipeline.settings import Guard

    guard = Guard(get_defense(method, **parse_parameters(parameters)), seed=seed)
    recipe, options = recipe.removeprefix("gguf:"), read_gguf_options(gguf)
    make_plan = partial(make_gguf_plan, recipe=recipe, options=options, ignore=ignore)
    report, _ = convert_guarded(script, arguments, make_plan, guard)
    print_report(report, render_guard(report), json_target)
    return UnguardableError.exit_code if report.unguarded else 0
