"""``qcbguard verify``: does the stock quantizer store what was planned?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcbguard_plugins.cli.output import json_option, print_report, progress_bar, quieten_libraries
from qcbguard_plugins.errors import UnguardableError, UsageError, VerificationError

if TYPE_CHECKING:
    from qcbguard_plugins.checkpoint.manifest import VerifyReport


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    help="For a quantized model: the guarded folder that it was made from; for a GGUF file only if not in the file.",
)
@json_option
def command(path: Path, plan: Path | None, json_target: str | None) -> int:
    """Compare codes with the plan.

    PATH is a folder that 'qcbguard guard' made, which the stock quantizer is run on, a GGUF file that llama-quantize
    wrote, a folder that GPTQ or OpenVINO wrote, or a quantized ONNX file.
    """
    from qcbguard_plugins.cli.render.text import render_verify
    from qcbguard_plugins.pipeline.verify_export import is_export, verify_export

    if is_export(path):
        report = verify_export(path, plan=plan)
    else:
        report = _verify_gguf(path, plan) if path.is_file() else _verify_folder(path, plan)
    print_report(report, render_verify(report), json_target)
    if not report.clean:
        return VerificationError.exit_code
    return UnguardableError.exit_code if report.unguarded else 0


def _verify_folder(folder: Path, plan: Path | None) -> VerifyReport:
    from qcbguard_plugins.checkpoint.manifest import read_manifest
    from qcbguard_plugins.pipeline.verify import verify_checkpoint

    if plan is not None:
        return _verify_gptq(folder, plan)
    quieten_libraries()
    num_weights = sum(tensor.num_weights for tensor in read_manifest(folder).tensors)
    with progress_bar(num_weights, "verifying") as progress:
        return verify_checkpoint(folder, progress=progress)


def _verify_gptq(folder: Path, plan: Path) -> VerifyReport:
    from qcbguard_plugins.checkpoint.manifest import read_manifest
    from qcbguard_plugins.pipeline.verify_gptq import is_gptq_folder, verify_gptq

    if not is_gptq_folder(folder):
        raise UsageError("--plan goes with what a quantizer wrote; a guarded folder carries its own plan")
    num_weights = sum(tensor.num_weights for tensor in read_manifest(plan).tensors)
    with progress_bar(num_weights, "verifying") as progress:
        return verify_gptq(folder, plan=plan, progress=progress)


def _verify_gguf(path: Path, plan: Path | None) -> VerifyReport:
    from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
    from qcbguard_plugins.pipeline.verify_gguf import find_plan, verify_gguf

    num_weights = sum(tensor.num_weights for tensor in find_plan(open_gguf(path), plan).tensors)
    with progress_bar(num_weights, "verifying") as progress:
        return verify_gguf(path, plan=plan, progress=progress)
