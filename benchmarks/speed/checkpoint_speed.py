"""A sharded checkpoint guarded by one and by two processes, beside a plain copy of it, in one run.

    python -m benchmarks.speed.checkpoint_speed --gigabytes 2 --json checkpoint_speed.json

Every job runs in processes of its own, each with one thread unless the table says otherwise. The source is read once
before, so that all find it in the page cache alike; every job flushes what it wrote to the disk. The kernels are
compiled before, as they are on every machine once. The start of a job is all that it does before the first weight:
imports and the plan, as a dry run does them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._common import MODELS_DIR, add_json, machine, parser_of, write_json

HIDDEN, INTERMEDIATE, VOCAB = 4096, 11008, 256
GUARD = ("-m", "qcbguard_plugins.cli", "guard")
TEAM = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def make_checkpoint(folder: Path, num_bytes: int, dtype_name: str = "bfloat16") -> int:
    """A Llama of random weights, a shard for each block; returns the size of its largest tensor in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    dtype = getattr(torch, dtype_name)
    attention, mlp = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)
    shapes = {f"self_attn.{name}_proj": attention for name in "qkvo"}
    shapes |= {"mlp.gate_proj": mlp, "mlp.up_proj": mlp, "mlp.down_proj": mlp[::-1]}
    per_layer = sum(rows * columns for rows, columns in shapes.values()) * dtype.itemsize
    num_layers = max(1, round(num_bytes / per_layer))
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
            for name, shape in shapes.items()
        }
        tensors |= {
            f"{prefix}{name}_layernorm.weight": torch.ones(HIDDEN, dtype=dtype) for name in ("input", "post_attention")
        }
        if layer == 0:
            table = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
            tensors |= {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(HIDDEN, dtype=dtype)}
        shard = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return HIDDEN * INTERMEDIATE * dtype.itemsize


def copy(source: Path, target: Path) -> None:
    """Copy a folder and flush it to the disk."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def run(arguments: list[str], num_threads: int) -> dict[str, float]:
    """Wall and processor seconds of a process and its children, and the highest memory of one of them, in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _WITH_PEAK, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    cpu_s, peak = output.splitlines()[-1].split()
    return {"elapsed_s": time.perf_counter() - start, "cpu_s": float(cpu_s), "peak_bytes": 1024 * int(peak)}


# What a process and all that it waited for took, which its parent could not tell from others.
_WITH_PEAK = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode\n"
    "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "print(used.ru_utime + used.ru_stime, used.ru_maxrss)\n"
    "sys.exit(code)\n"
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--method", default="stochastic")
    add_json(parser)
    parser.add_argument("--work-dir", type=Path, help="Where to put the checkpoints; a temporary folder by default.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as name:
        source = Path(name) / "source"
        source.mkdir()
        largest = make_checkpoint(source, int(arguments.gigabytes * 1e9))
        guard = [*GUARD, str(source), "--for", arguments.format, "--method", arguments.method, "--seed", "0", "--out"]
        jobs = {
            "plain copy": (["-m", __spec__.name, "copy", str(source)], 1),
            "start of one process": ([*guard[:-1], "--dry-run", "--out"], 1),
            "start of two processes": ([*TEAM, *guard[:-1], "--dry-run", "--out"], 1),
            "one process, one thread": (guard, 1),
            "one process, two threads": (guard, 2),
            "two processes, one thread each": ([*TEAM, *guard], 1),
        }
        results = {}
        run([*guard[:2], "guard", str(MODELS_DIR / "clean"), *guard[4:], str(Path(name) / "warm-up")], 1)
        for job, (command, num_threads) in jobs.items():
            target = Path(name) / "target"
            results[job] = run([*command, str(target)], num_threads)
            shutil.rmtree(target, ignore_errors=True)
    seconds = {job: result["elapsed_s"] for job, result in results.items()}
    start, start_of_two = seconds["start of one process"], seconds["start of two processes"]
    one, two = seconds["one process, one thread"], seconds["two processes, one thread each"]
    two_threads, copied = seconds["one process, two threads"], seconds["plain copy"]
    report = {
        "machine": machine(),
        "load": os.getloadavg()[1],
        "gigabytes": arguments.gigabytes,
        "format": arguments.format,
        "method": arguments.method,
        "largest_tensor_bytes": largest,
        "jobs": results,
        "two_processes_faster": one / two,
        "two_processes_faster_without_start": (one - start) / (two - start_of_two),
        "times_a_copy": two_threads / copied,
        "times_a_copy_without_start": (two_threads - start) / copied,
    }
    print(write_json(report, arguments.json))


if __name__ == "__main__":
    if sys.argv[1:2] == ["copy"]:
        copy(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
