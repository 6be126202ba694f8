"""``qcbguard scan``: do the weights carry a quantization-conditioned backdoor?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from qcbguard_plugins.cli.evidence import Attestation, attest_option
from qcbguard_plugins.cli.options import max_memory_option
from qcbguard_plugins.cli.output import json_option, print_report, refuse_existing, write_new
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("scan")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "formats",
    default="nf4,fp4,int8",
    show_default=True,
    help="Formats that the model may be quantized to, separated by commas.",
)
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page with the verdict and plots.")
@click.option("--sarif", "sarif_path", type=click.Path(path_type=Path), help="Write a SARIF 2.1.0 log.")
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), help="Write a section for a model card.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed; a fresh one by default, recorded either way.")
@click.option("--exhaustive", is_flag=True, help="Test every weight of large tensors, not a random part; slower.")
@max_memory_option
@attest_option
@json_option
def command(
    model: Path,
    formats: str,
    html_path: Path | None,
    sarif_path: Path | None,
    markdown_path: Path | None,
    seed: int | None,
    exhaustive: bool,
    budget_bytes: int | None,
    attest_path: Path | None,
    json_target: str | None,
) -> int:
    """Test the weights of MODEL: a folder of safetensors files, one such file, or a GGUF file, in full precision.

    Weights only: no class of the model is built and no code of it is run. That is all there is of a single file or an
    untrusted folder, and it does not see every attack: 'qcbguard check' looks at inputs and behaviour as well.
    Exit codes: 0 no marks, 1 attacked, 2 error, 3 some tensors could not be tested, 4 usage.
    """
    from qcbguard_plugins._util.distributed import join_process_group
    from qcbguard_plugins.checkpoint.open_weights import open_weights
    from qcbguard_plugins.cli.render.scan_text import render_markdown, render_scan
    from qcbguard_plugins.detection.weights.measure import MAX_WEIGHTS
    from qcbguard_plugins.detection.weights.scan import scan_model

    refuse_existing(html_path, sarif_path, markdown_path)
    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise UsageError("--for names no format", remedy="For example: --for nf4,int8")
    group = join_process_group()
    attestation = Attestation(attest_path if group.rank == 0 else None, model)
    num_weights = sum(target.num_weights for target in open_weights(model).targets)
    with progress_bar(num_weights // group.world_size, "scanning", shown=group.rank == 0) as progress:
        max_weights = num_weights if exhaustive else MAX_WEIGHTS
        report = scan_model(
            model,
            names,
            seed=seed,
            max_weights=max_weights,
            progress=progress,
            group=group,
            budget_bytes=budget_bytes,
        )
    if group.rank > 0:
        return 0  # the first process has the report, and the exit code
    if html_path is not None:
        from qcbguard_plugins.cli.render.scan_html import render_html

        write_new(html_path, render_html(report))
    if sarif_path is not None:
        from qcbguard_plugins.cli.render.sarif import to_sarif

        write_new(sarif_path, json.dumps(to_sarif(report), indent=2) + "\n")
    if markdown_path is not None:
        write_new(markdown_path, render_markdown(report))
    print_report(report, render_scan(report, model), json_target)
    attestation.add(report)
    return report.exit_code
