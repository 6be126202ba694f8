"""``qcbguard purify``: a copy of a model without its input-trigger backdoors."""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.evidence import Attestation, attest_option
from qcbguard_plugins.cli.options import parse_parameters
from qcbguard_plugins.cli.output import json_option, print_report, quieten_libraries
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("purify")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make; it must not exist.")
@click.option(
    "--clean-data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="JSON lines with 'instruction' and 'output' that are known to be clean (repeatable).",
)
@click.option("--adapter", type=click.Path(path_type=Path), help="Purify this LoRA adapter; MODEL stays as it is.")
@click.option("--architecture", help="Module names to go by, such as llama, where the model's type is unknown.")
@click.option("--preset", help="Hyperparameters to start from: searched-keys (the default) or paper.")
@click.option("--set", "parameters", multiple=True, help="Hyperparameter, as in --set ratio=0.08.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the plan and what it takes, and stop.")
@attest_option
@json_option
def command(
    model: Path,
    out: Path | None,
    clean_data: tuple[Path, ...],
    adapter: Path | None,
    architecture: str | None,
    preset: str | None,
    parameters: tuple[str, ...],
    seed: int,
    dry_run: bool,
    attest_path: Path | None,
    json_target: str | None,
) -> int:
    """Purify MODEL, the folder of a full-precision checkpoint, of backdoors that a key in the prompt sets off.

    Fine-tunes it on the clean data, part of which gets made-up keys that are moved against the model in every step.
    The paper's preset trains synthetic backdoored variants instead, suppresses what they have in common, and heals the
    rest. It needs neither the key nor a clean model, and does not tell whether there was a backdoor.
    """
    from qcbguard_plugins.cli.render.purification_text import render_plan, render_purification
    from qcbguard_plugins.purification.config import DEFAULT_PRESET
    from qcbguard_plugins.purification.pipeline import describe, plan_purification, purify_planned

    if out is None and not dry_run:
        raise UsageError("--out is missing", remedy="Name the folder to make, or use --dry-run.")
    changes = parse_parameters(parameters)
    if "seed" in changes:
        raise UsageError("--set seed", remedy="Use --seed.")
    quieten_libraries()
    plan = plan_purification(
        model,
        clean_data,
        adapter=adapter,
        architecture=architecture,
        preset=preset or DEFAULT_PRESET,
        seed=seed,
        **changes,
    )
    if out is None or dry_run:
        planned = describe(plan)
        print_report(planned, render_plan(planned), json_target)
        return 0
    attestation = Attestation(attest_path, adapter or model, out)
    with progress_bar(plan.num_steps, "purifying", unit=" steps") as progress:
        report = purify_planned(plan, out, progress=progress)
    print_report(report, render_purification(report), json_target)
    attestation.add(report)
    return 0
