"""``qcbguard verify``: does the stock quantizer store what was planned?"""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.evidence import Attestation, attest_option
from qcbguard_plugins.cli.output import json_option, print_report, quieten_libraries
from qcbguard_plugins.errors import UnguardableError, VerificationError
from qcbguard_plugins.pipeline.progress import progress_bar


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="For a quantized model: the guarded folder that it was made from; for a GGUF file only if not in the file.",
)
@attest_option
@json_option
def command(path: Path, plan: Path | None, attest_path: Path | None, json_target: str | None) -> int:
    """Compare codes with the plan.

    PATH is a folder that 'qcbguard guard' made, which the stock quantizer is run on, a GGUF file that llama-quantize
    wrote, a folder that GPTQ or OpenVINO wrote, or a quantized ONNX file.
    """
    from qcbguard_plugins.cli.render.text import render_verify
    from qcbguard_plugins.pipeline.verify import open_verification

    quieten_libraries()
    attestation = Attestation(attest_path, path)
    verification = open_verification(path, plan)
    with progress_bar(verification.num_weights, "verifying") as progress:
        report = verification.run(progress)
    print_report(report, render_verify(report), json_target)
    attestation.add(report, plan)
    if not report.clean:
        return VerificationError.exit_code
    return 0 if report.is_complete else UnguardableError.exit_code
