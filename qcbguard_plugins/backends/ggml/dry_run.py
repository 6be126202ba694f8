"""Ask ``llama-quantize`` itself which type each tensor will get."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.errors import UsageError

_TIMEOUT_S = 600
# [  25/  38] blk.2.attn_v.weight  - [  256,  128,  1,  1], type =  f32, size =  0.12 MiB ->  0.03 MiB (q6_K)
_LINE = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+-\s.*->.*\((\w+)\)\s*$")


def dry_run_types(binary: Path, model: Path, recipe: str, options: GgufOptions) -> tuple[dict[str, str], str]:
    """The type of every tensor that will be quantized, by tensor name, and the version of the binary.

    Args:
        binary: ``llama-quantize``.
        model: A full-precision GGUF file; only its header is read.
        recipe: A recipe's name.
        options: The user's flags and importance matrix.

    Raises:
        UsageError: The binary fails, or is one that has no ``--dry-run``.
    """
    imatrix = [] if options.imatrix_path is None else ["--imatrix", str(options.imatrix_path)]
    command = [str(binary), "--dry-run", *imatrix, *options.quantize_args, str(model), recipe]
    try:
        result = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{binary} cannot be run: {error}") from error
    output = (result.stdout + result.stderr).decode(errors="replace")
    matches = [match for line in output.splitlines() if (match := _LINE.match(line))]
    if result.returncode or not matches:
        # The end of the output is the one part that says what went wrong.
        raise UsageError(
            f"{binary.name} --dry-run does not say which types it will use (exit code {result.returncode})",
            details=output.strip().splitlines()[-5:],
            remedy="Check the flags given with --quantize-args, or name a newer binary with --llama-quantize.",
        )
    version = re.search(r"^version: (.+)$", output, re.MULTILINE)
    return {match[1]: match[2].upper() for match in matches}, version[1] if version else "unknown"
