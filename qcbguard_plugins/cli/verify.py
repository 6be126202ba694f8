"""``qcbguard verify``: does the stock quantizer store what was planned?"""

from __future__ import annotations

from pathlib import Path

import click

from qcbguard_plugins.cli.output import json_option, print_report, progress_bar, quieten_libraries
from qcbguard_plugins.errors import UnguardableError, VerificationError


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def command(folder: Path, json_target: str | None) -> int:
    """Quantize FOLDER, made by 'qcbguard guard', with the stock quantizer and compare its codes with the plan."""
    from qcbguard_plugins.pipeline import verify_checkpoint
    from qcbguard_plugins.report.model import read_manifest
    from qcbguard_plugins.report.text import render_verify

    quieten_libraries()
    num_weights = sum(tensor.num_weights for tensor in read_manifest(folder).tensors)
    with progress_bar(num_weights, "verifying") as progress:
        report = verify_checkpoint(folder, progress=progress)
    print_report(report, render_verify(report), json_target)
    if not report.clean:
        return VerificationError.exit_code
    return UnguardableError.exit_code if report.unguarded else 0
