"""Every ratio of speed, measured in one run, and the page about them.

    python -m benchmarks.performance [--llama-quantize BINARY] [--out docs/performance.md]

Each part is a benchmark of its own, run as a process. A part that this machine cannot run is left out of the page with
the reason. `--parts` runs some of them; the others keep what `--results` holds of an earlier run, with its commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import DATA_DIR, DOCS_DIR, ROOT, commit, machine, parser_of
from benchmarks.pages.performance_page import SECTIONS, page

LLAMA_QUANTIZE = ROOT / ".cache" / "llama-cpp" / "bin" / "llama-quantize"


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The benchmarks by name, each to be followed by ``--json FILE``."""
    gguf = [] if args.llama_quantize is None else ["--llama-quantize", str(args.llama_quantize)]
    return {
        "tensors": ["-m", "benchmarks.speed.data_free_speed"],
        "checkpoint": ["-m", "benchmarks.speed.checkpoint_speed", "--gigabytes", str(args.gigabytes)],
        "gguf": ["-m", "benchmarks.speed.gguf_speed", *gguf],
        "calibrated": ["-m", "benchmarks.speed.calibrated_speed"],
        "gpu": ["-m", "benchmarks.speed.data_free_speed", "--device", "cuda"],
    }


def why_not(part: str, args: argparse.Namespace) -> str:
    """Why this machine cannot run a part; empty where it can."""
    if part == "gguf" and args.llama_quantize is None:
        return "llama-quantize is not built: .ci/build-llama-cpp"
    if part == "calibrated" and args.gptq_python is None:
        return "GPTQModel is not installed: .ci/test-gptq makes its environment, --gptq-python names it"
    if part == "gpu":
        import torch

        return "" if torch.cuda.is_available() else "no CUDA device"
    return ""


def measure(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part; its outcome, or why there is none."""
    reason = why_not(part, args)
    if reason:
        return {"skipped": reason}
    python = str(args.gptq_python) if part == "calibrated" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run([python, *commands(args)[part], "--json", str(out)], check=True, cwd=ROOT)
        return {**json.loads(out.read_text(encoding="utf-8")), "machine": machine(), "commit": commit()}


def main() -> None:
    """Measure, and write the page."""
    parser = parser_of(__doc__)
    parser.add_argument("--llama-quantize", type=Path, default=LLAMA_QUANTIZE if LLAMA_QUANTIZE.exists() else None)
    parser.add_argument("--gptq-python", type=Path, help="the interpreter of an environment with GPTQModel")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoint; three times that on the disk")
    parser.add_argument("--parts", default=",".join(SECTIONS), help="with commas")
    parser.add_argument("--results", type=Path, default=DATA_DIR / "performance.json")
    parser.add_argument("--out", type=Path, default=DOCS_DIR / "performance.md")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    for part in filter(None, args.parts.split(",")):
        results[part] = measure(part, args)
        args.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    args.out.write_text(page(results), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
