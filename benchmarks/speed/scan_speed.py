"""A scan of 1 GB of random weights beside reading the file and quantizing it with bitsandbytes, in one run.

    python -m benchmarks.speed.scan_speed --json scan_speed.json

Each job runs in a process of its own, so that its peak memory is its own. The file is read once before, so that all
three find it in the page cache alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks._common import add_json, machine, parser_of, run_module, write_json

FORMATS = ("nf4", "fp4", "int8")
SHAPES = ((4096, 4096), (4096, 4096), (11008, 4096), (4096, 11008))
_NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def make_checkpoint(folder: Path, num_bytes: int) -> int:
    """Random fp16 weights in shards of four tensors; returns the size of the largest tensor in bytes."""
    written, layer, weight_map = 0, 0, {}
    while written < num_bytes:
        tensors = {}
        for name, shape in zip(_NAMES, SHAPES, strict=True):
            if written < num_bytes:
                generator = torch.Generator().manual_seed(written)
                tensors[f"model.layers.{layer}.{name}.weight"] = (torch.randn(shape, generator=generator) * 0.02).half()
                written += 2 * shape[0] * shape[1]
        shard = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        layer += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return max(2 * rows * columns for rows, columns in SHAPES)


def read(folder: Path, formats: list[str]) -> None:
    buffer = bytearray(1 << 24)
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            while file.readinto(buffer):
                pass


def quantize(folder: Path, formats: list[str]) -> None:
    from bitsandbytes import functional

    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                weight = file.get_tensor(key)
                for name in formats:
                    if name == "int8":
                        functional.int8_vectorwise_quant(weight)
                    else:
                        functional.quantize_4bit(weight, blocksize=64, quant_type=name)


def scan(folder: Path, formats: list[str]) -> None:
    from qcbguard_plugins.detection.weights.scan import scan_model

    report = scan_model(folder, formats)
    assert report.verdict == "clean", report.verdict


JOBS = {"read": read, "quantize": quantize, "scan": scan}


def run_job(name: str, folder: Path, formats: list[str]) -> dict[str, float]:
    """Run one job in its own process; the time is without imports, the memory is the process's peak."""
    return run_module(__spec__.name, "--job", name, "--folder", str(folder), "--for", ",".join(formats))


def peak_bytes() -> int:
    """Peak resident memory of this process. Not ru_maxrss, which a child takes over from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    add_json(parser)
    parser.add_argument("--for", dest="formats", default=",".join(FORMATS))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    if arguments.job:
        wall, cpu = time.perf_counter(), time.process_time()
        JOBS[arguments.job](arguments.folder, formats)
        peak = peak_bytes()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"elapsed_s": wall, "cpu_s": cpu, "peak_bytes": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = make_checkpoint(folder, int(arguments.gigabytes * 1e9))
        read(folder, formats)
        results = {job: run_job(job, folder, formats) for job in JOBS}
    scan_, quantize_ = results["scan"], results["quantize"]
    summary = {
        "gigabytes": arguments.gigabytes,
        "formats": formats,
        "machine": f"{machine()}, {torch.get_num_threads()} threads",
        "largest_tensor_bytes": largest,
        **results,
        "scan_over_quantize": scan_["elapsed_s"] / quantize_["elapsed_s"],
        "scan_over_quantize_cpu": scan_["cpu_s"] / quantize_["cpu_s"],
        "scan_over_read": scan_["elapsed_s"] / results["read"]["elapsed_s"],
        "peak_limit_bytes": 3 * largest + 500_000_000,
        "within_limits": scan_["elapsed_s"] <= 3 * quantize_["elapsed_s"]
        and scan_["peak_bytes"] <= 3 * largest + 500_000_000,
    }
    print(write_json(summary, arguments.json))


if __name__ == "__main__":
    main()
