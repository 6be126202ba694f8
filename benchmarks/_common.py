"""What the scripts share: paths, their command lines and result files, and which machine and commit was measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA_DIR = ROOT / "benchmarks" / "data"
DOCS_DIR = ROOT / "docs"
EXAMPLES_DIR = ROOT / "examples"
MODELS_DIR = EXAMPLES_DIR / "models"
#: Held-out pairs of the example models.
PROMPTS = MODELS_DIR / "prompts.jsonl"


def parser_of(doc: str | None, *, whole: bool = False) -> argparse.ArgumentParser:
    """A parser that describes a script by the first line of its docstring, or by all of it."""
    text = (doc or "").strip()
    return argparse.ArgumentParser(
        description=text if whole else text.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, the file for :func:`write_json`."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file as well")


def write_json(report: Any, path: Path | None) -> str:
    """The text of a report, written to a file where one is named."""
    text = json.dumps(report, indent=2)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of a call; work that it left to a GPU is waited for."""
    import torch

    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a process of its own; what its last line of output says as JSON."""
    command = [sys.executable, "-m", name, *arguments]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def machine() -> str:
    """Cores and name of the processor, and whether there is a GPU."""
    from qcbguard_plugins.lab.bench.output import describe_machine
    from qcbguard_plugins.lab.bench.results import this_machine

    found, cpuinfo = this_machine(), Path("/proc/cpuinfo")
    is_wide = cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text(encoding="utf-8")
    name = f"{found.processor} with AVX512-BF16" if is_wide else found.processor
    return describe_machine(found.model_copy(update={"processor": name}))


def commit() -> str:
    """The commit that is measured, marked where the work tree differs from it."""
    from qcbguard_plugins.lab.bench.results import commit_of_checkout

    return commit_of_checkout() or "unknown"
