"""Fuzz target: the scanner over arbitrary bytes that claim to be a safetensors or GGUF file.

With atheris, for as long as one likes:

    python -m tests.fuzz.fuzz_safetensors -max_total_time=600 corpus/

``tests/fuzz/test_fuzz_target.py`` runs the same target over a few hundred damaged files in every test run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from qcbguard_plugins.errors import QcbguardError
from qcbguard_plugins.scan import scan_model

MAX_BYTES = 1 << 16


def scan_bytes(content: bytes) -> None:
    """Scan bytes as a file; any error but the package's own is a defect."""
    suffix = ".gguf" if content[:4] == b"GGUF" else ".safetensors"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        path.write_bytes(content[:MAX_BYTES])
        try:
            scan_model(path, ["nf4"], seed=0)
        except QcbguardError:
            return


def main() -> None:
    """Hand the target to atheris."""
    import atheris

    atheris.Setup(sys.argv, scan_bytes)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
