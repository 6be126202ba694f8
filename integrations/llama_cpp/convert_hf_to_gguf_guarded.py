#!/usr/bin/env python3
"""llama.cpp's convert_hf_to_gguf.py with a guard against quantization-conditioned backdoors.

Put this file beside the convert_hf_to_gguf.py of your llama.cpp and call it in its place, with one option more: what
llama-quantize will be given afterwards.

    python convert_hf_to_gguf_guarded.py --for Q4_K_M MODEL_DIR --outtype f32 --outfile model.gguf
    llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M
    qcbguard verify model-Q4_K_M.gguf

Options of the guard come first (see `qcbguard convert-hf-to-gguf --help`); everything from MODEL_DIR on goes to the
converter as it is.
"""

import sys
from pathlib import Path

CONVERTER = Path(__file__).resolve().parent / "convert_hf_to_gguf.py"
WITH_VALUE = {
    "--for", "--method", "--set", "--seed", "--ignore", "--llama-quantize", "--quantize-args", "--imatrix",
    "--ggml-library", "--min-as-planned", "--json",
}  # fmt: skip


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The guard's options, and the converter's arguments."""
    position = 0
    while position < len(arguments):
        name, _, value = arguments[position].partition("=")
        if name not in WITH_VALUE:
            break
        position += 1 if value else 2
    return arguments[:position], arguments[position:]


def main() -> int:
    """Convert and guard; the exit code is qcbguard's."""
    try:
        from qcbguard_plugins.cli import main as qcbguard
    except ImportError:
        print("error: pip install 'qcbguard-plugins[gguf]'", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    options, rest = split(sys.argv[1:])
    return qcbguard(["convert-hf-to-gguf", *options, str(CONVERTER), *rest])


if __name__ == "__main__":
    sys.exit(main())
