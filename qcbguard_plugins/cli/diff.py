"""``qcbguard diff``: what does the quantized model say that the original does not?"""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.evidence import Attestation, attest_option
from qcbguard_plugins.cli.output import json_option, print_report, quieten_libraries, refuse_existing, write_new


@click.command("diff")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--for", "format_name", required=True, help="Format that the model will be quantized to.")
@click.option("--prompts", "prompts_path", type=click.Path(path_type=Path), help="Your prompts: .txt or .jsonl.")
@click.option(
    "--draws", default=6, show_default=True, type=click.IntRange(3, 64), help="Sign-randomised models, at most."
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed; a fresh one by default, recorded either way.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page.")
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), help="Write a section for a model card.")
@attest_option
@json_option
def command(
    model: Path,
    format_name: str,
    prompts_path: Path | None,
    draws: int,
    seed: int | None,
    html_path: Path | None,
    markdown_path: Path | None,
    attest_path: Path | None,
    json_target: str | None,
) -> int:
    """Compare the answers of MODEL, a full-precision folder with its tokenizer, before and after quantization.

    Exit codes: 0 no difference beyond chance, 1 a difference, 2 error, 4 usage.
    """
    from qcbguard_plugins.cli.render.diff_html import render_diff_html
    from qcbguard_plugins.cli.render.diff_text import render_diff, render_diff_markdown
    from qcbguard_plugins.detection.behaviour.compare import diff_model
    from qcbguard_plugins.models.skeleton import require_transformers
    from qcbguard_plugins.pipeline.progress import progress_bar

    refuse_existing(html_path, markdown_path)
    require_transformers()
    quieten_libraries()
    attestation = Attestation(attest_path, model)
    with progress_bar(draws + 2, "comparing", unit=" models") as progress:
        report = diff_model(
            model, format_name, prompts_path=prompts_path, num_draws=draws, seed=seed, progress=progress
        )
    if html_path is not None:
        write_new(html_path, render_diff_html(report))
    if markdown_path is not None:
        write_new(markdown_path, render_diff_markdown(report))
    print_report(report, render_diff(report), json_target)
    attestation.add(report)
    return report.exit_code
