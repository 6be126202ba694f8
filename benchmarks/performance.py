"""Every ratio of speed, measured in one run, and the page about them.

    python -m benchmarks.performance [--llama-quantize BINARY] [--out docs/performance.md]

Each part is a benchmark of its own, run as a process. A part that this machine cannot run is left out of the page with
the reason. `--parts` runs some of them; the others keep what `--results` holds of an earlier run, with its commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LLAMA_QUANTIZE = ROOT / ".cache" / "llama-cpp" / "bin" / "llama-quantize"
Rows = list[tuple[str, ...]]


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The benchmarks by name, each to be followed by ``--json FILE``."""
    gguf = [] if args.llama_quantize is None else ["--llama-quantize", str(args.llama_quantize)]
    return {
        "tensors": ["-m", "benchmarks.data_free_speed"],
        "checkpoint": ["-m", "benchmarks.checkpoint_speed", "--gigabytes", str(args.gigabytes)],
        "gguf": ["-m", "benchmarks.gguf_speed", *gguf],
        "calibrated": ["-m", "benchmarks.calibrated_speed"],
        "gpu": ["-m", "benchmarks.data_free_speed", "--device", "cuda"],
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


def machine() -> str:
    """Cores and name of the processor, and whether there is a GPU."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in lines.splitlines() if line.startswith("model name")), "")
    wide = " with AVX512-BF16" if "avx512_bf16" in lines else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {name or platform.machine()}{wide}, {gpu}"


def commit() -> str:
    """The commit that is measured, marked where the work tree differs from it."""
    run = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def row(what: str, seconds: tuple[float, float] | None, ratio: float, goal: float | None, *, at_most: bool = True):
    """One ratio beside its goal."""
    times = f"{seconds[0]:.2f} s / {seconds[1]:.2f} s" if seconds else ""
    if goal is None:
        return what, times, f"{ratio:.2f}", "", ""
    is_met = ratio <= goal if at_most else ratio >= goal
    return (
        what,
        times,
        f"{ratio:.2f}",
        f"{'at most' if at_most else 'at least'} {goal:g}",
        "met" if is_met else "missed",
    )


def tensor_rows(result: dict[str, Any]) -> Rows:
    """Guard over bitsandbytes, tensor by tensor."""
    return [
        row(
            f"{each['format']}, {each['dtype']}",
            (each["guard_s"], each["stock_s"]),
            each["guard_s"] / each["stock_s"],
            None if each["format"] == "int8" else 0.5,
        )
        for each in result["rows"]
    ]


def checkpoint_rows(result: dict[str, Any]) -> Rows:
    """A whole checkpoint beside a copy of it, and by two processes."""
    seconds = {job: values["elapsed_s"] for job, values in result["jobs"].items()}
    one, two, both = (
        seconds[job]
        for job in ("one process, one thread", "two processes, one thread each", "one process, two threads")
    )
    start, start_of_two = seconds["start of one process"], seconds["start of two processes"]
    copy, own, own_of_two = seconds["plain copy"], one - start, two - start_of_two
    largest, peak = result["largest_tensor_bytes"], result["jobs"]["one process, one thread"]["peak_bytes"]
    room = 2 * largest + 500e6
    return [
        row(f"guard, {result['gigabytes']:g} GB, two threads, over a plain copy", (both, copy), both / copy, 2),
        row("the same less the start", (both - start, copy), (both - start) / copy, None),
        row("one process over two, one thread each", (one, two), one / two, 1.8, at_most=False),
        row("the same, each less its start", (own, own_of_two), own / own_of_two, None),
        row(f"peak of one thread over twice the largest tensor and 500 MB, {peak / 1e6:.0f} MB / {room / 1e6:.0f} MB",
            None, peak / room, 1),
    ]  # fmt: skip


def gguf_rows(result: dict[str, Any]) -> Rows:
    """The guard's own part over llama-quantize's whole time, and whole over whole."""
    rows = []
    for each in result["rows"]:
        own, whole, stock = each["own_s"], each["guard_s"], each["stock_s"]
        rows.append(row(f"{each['recipe']}, own part", (own, stock), own / stock, 1))
        rows.append(row(f"{each['recipe']}, whole run", (whole, stock), whole / stock, None))
    return rows


def calibrated_rows(result: dict[str, Any]) -> Rows:
    """Time and divergence beside GPTQModel's."""
    guard, stock = result["guard"], result["stock"]
    return [
        row("feedback over GPTQModel, time", (guard["elapsed_s"], stock["elapsed_s"]),
            guard["elapsed_s"] / stock["elapsed_s"], 1),
        row(f"divergence of the guarded weights, {guard['kl']:.5f} / {stock['kl']:.5f} nats", None,
            guard["kl"] / stock["kl"], 1),
        row(f"of what GPTQModel makes of them, {guard['stored_kl']:.5f} / {stock['kl']:.5f} nats", None,
            guard["stored_kl"] / stock["kl"], 1),
    ]  # fmt: skip


SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], Rows]]] = {
    "tensors": (
        "One weight, data-free",
        "`stochastic` on a 4096x4096 weight beside bitsandbytes' own quantizer of the same weight, medians. The guard "
        "reads the weight, finds block scales and neighbours, draws, writes the new weight and hashes its codes. "
        "8 bits have no goal: bitsandbytes rounds them in one short operation.",
        tensor_rows,
    ),
    "checkpoint": (
        "A checkpoint, data-free",
        "A Llama of random bfloat16 weights in shards, guarded for NF4 and verified, beside a copy of the folder; both "
        "flush what they wrote to the disk. The start is everything before the first weight: the imports of torch, "
        "transformers and bitsandbytes, and the plan; with two processes the launcher's own imports too.",
        checkpoint_rows,
    ),
    "gguf": (
        "A GGUF file, data-free",
        "Beside `llama-quantize` of the same F16 file on as many threads, medians of five runs in turn. The guard's "
        "own part is all that is not reading and writing files; its whole run writes a file that is 2 to 7 times as "
        "large as llama-quantize's and flushes it to the disk, which that one does not do.",
        gguf_rows,
    ),
    "calibrated": (
        "Calibrated: feedback beside GPTQModel",
        "The same clean model, the same calibration tokens, 4 bits in groups of 128; each in this run. Divergence is "
        "that from full precision on held-out text; the guard's figures are means over two seeds.",
        calibrated_rows,
    ),
    "gpu": ("One weight on a GPU, data-free", "As the first table, beside bitsandbytes' CUDA kernels.", tensor_rows),
}


def page(results: dict[str, Any]) -> str:
    """The Markdown of the results."""
    lines = [
        "# Performance",
        "",
        "Written by `make bench` (`python -m benchmarks.performance`), which runs every benchmark and fills in what it",
        "measured. Times are the guard's and then the other's, the ratio is the first over the second.",
    ]
    for part, (title, text, rows_of) in SECTIONS.items():
        result = results.get(part, {"skipped": "not run"})
        lines += ["", f"## {title}", "", text, ""]
        if "skipped" in result:
            lines.append(f"Not measured: {result['skipped']}.")
            continue
        lines += [f"Machine: {result['machine']}; commit {result['commit']}.", ""]
        lines += ["| what | times | ratio | goal | |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows_of(result)]
    notes = Path(__file__).with_name("performance_notes.md")
    return "\n".join([*lines, "", notes.read_text(encoding="utf-8").rstrip(), ""])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-quantize", type=Path, default=LLAMA_QUANTIZE if LLAMA_QUANTIZE.exists() else None)
    parser.add_argument("--gptq-python", type=Path, help="the interpreter of an environment with GPTQModel")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoint; three times that on the disk")
    parser.add_argument("--parts", default=",".join(SECTIONS), help="with commas")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "performance.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    for part in filter(None, args.parts.split(",")):
        results[part] = measure(part, args)
        args.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    args.out.write_text(page(results), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
