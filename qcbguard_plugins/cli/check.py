"""``qcbguard check``: is this model attacked? Weights, inputs and behaviour, one verdict."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import click

from qcbguard_plugins._util.progress import Progress
from qcbguard_plugins.cli.options import max_memory_option
from qcbguard_plugins.cli.output import json_option, print_report, quieten_libraries
from qcbguard_plugins.errors import UsageError

_STEPS = ("weights", "inputs", "behaviour")


@click.command("check")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--for", "formats", required=True, help="Formats that the model will be quantized to, separated by commas."
)
@click.option("--skip", multiple=True, type=click.Choice(_STEPS), help="Leave a step out; may be given twice.")
@click.option("--every-step", is_flag=True, help="Go on after a finding that leaves no question.")
@click.option("--prompts", "prompts_path", type=click.Path(path_type=Path), help="Your prompts: .txt or .jsonl.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed; a fresh one by default, recorded either way.")
@max_memory_option
@json_option
def command(
    model: Path,
    formats: str,
    skip: tuple[str, ...],
    every_step: bool,
    prompts_path: Path | None,
    seed: int | None,
    budget_bytes: int | None,
    json_target: str | None,
) -> int:
    """Test MODEL, a full-precision folder with its tokenizer, before it is quantized: cheapest step first.

    weights: marks of an attack in the weights. inputs: does rounding act on what the layers read? behaviour: does the
    quantized model answer otherwise?

    Exit codes: 0 nothing found, 1 attacked, 2 error, 3 a step could not be done as a whole, 4 usage.
    """
    from qcbguard_plugins.cli.render.check_text import render_check
    from qcbguard_plugins.detection.check import check_model
    from qcbguard_plugins.models.skeleton import require_transformers
    from qcbguard_plugins.pipeline.progress import progress_bar

    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise UsageError("--for names no format", remedy="For example: --for nf4,int8")
    require_transformers()
    quieten_libraries()

    def bar(step: str, total: int) -> AbstractContextManager[Progress]:
        return progress_bar(total, step, unit=" models" if step == "behaviour" else " weights")

    report = check_model(
        model,
        names,
        skip=skip,
        every_step=every_step,
        prompts_path=prompts_path,
        seed=seed,
        budget_bytes=budget_bytes,
        progress=bar,
    )
    print_report(report, render_check(report, model), json_target)
    return report.exit_code
