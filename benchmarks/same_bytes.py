"""Does a change keep every byte? Guard the examples with two checkouts and compare what they make.

    git worktree add /tmp/before COMMIT
    OMP_NUM_THREADS=1 python -m benchmarks.same_bytes /tmp/before . --out build/same-bytes.json

Folders for each format and method, GGUF files, and models that are loaded guarded in bitsandbytes; every seed is fixed.
Compared are the bytes of all tensors and the planned codes of each, not the reports. A run that ends in an error counts
by its exit code. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS_DIR = Path(__file__).resolve().parents[1] / "examples" / "models"
FORMATS = ("nf4", "fp4", "int8", "gguf:Q4_K_M", "gptq-w4g128", "torchao:int8", "onnx:int8")
METHODS = ("feedback", "stochastic", "flipguard", "quantguard")
RECIPES = ("Q4_K_M", "Q4_0", "Q8_0", "IQ4_XS")
MODELS = ("attacked", "clean")
SEED = 7


def cases() -> Iterator[tuple[str, list[str]]]:
    """The name of each case and what the worker is told."""
    for model in MODELS:
        for format_name in FORMATS:
            for method in METHODS:
                yield f"folder {model} {format_name} {method}", ["folder", model, format_name, method]
        for method in METHODS:
            for bits in ("nf4", "fp4", "int8"):
                yield f"loaded {model} {bits} {method}", ["loaded", model, bits, method]
        yield f"in memory {model} nf4 feedback", ["memory", model, "nf4", "feedback"]
    for type_name in ("F32", "BF16"):
        for recipe in RECIPES:
            yield f"gguf file {type_name} {recipe} stochastic", ["gguf", type_name, recipe, "stochastic"]


def digest_of(tensors: dict[str, Any]) -> str:
    """SHA-256 over names and bytes of tensors."""
    import torch

    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def run_cli(*arguments: str) -> int:
    """The exit code of ``qcbguard``."""
    from qcbguard_plugins.cli import main

    return main([*arguments])


def folder(model: str, format_name: str, method: str) -> dict[str, str]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        code = run_cli(
            "guard", str(MODELS_DIR / model), "--for", format_name, "--out", str(out), "--method", method,
            "--seed", str(SEED),
        )  # fmt: skip
        if code:
            return {"exit code": str(code)}
        manifest = json.loads((out / "qcbguard.json").read_text())
        return {
            "weights": digest_of(load_file(out / "model.safetensors")),
            "plan": hashlib.sha256(
                "".join(sorted(t["codes_sha256"] for t in manifest["tensors"])).encode()
            ).hexdigest(),
            "verified": str(run_cli("verify", str(out))),
        }


def loaded(model: str, bits: str, method: str) -> dict[str, str]:
    import torch
    from transformers import AutoModelForCausalLM

    from qcbguard_plugins import Guard, GuardedBitsAndBytesConfig

    how = {"load_in_8bit": True} if bits == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": bits}
    with tempfile.TemporaryDirectory() as temporary:
        config = GuardedBitsAndBytesConfig(**how, guard=Guard(method, seed=SEED, cache_dir=Path(temporary)))
        quantized = AutoModelForCausalLM.from_pretrained(
            MODELS_DIR / model, quantization_config=config, dtype=torch.float32
        )
        return {"state": digest_of(dict(quantized.state_dict()))}


def memory(model: str, format_name: str, method: str) -> dict[str, str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qcbguard_plugins import Guard, guard_model

    network = AutoModelForCausalLM.from_pretrained(MODELS_DIR / model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / model)
    guard_model(network, format_name, Guard(method, seed=SEED), tokenizer=tokenizer)
    return {"state": digest_of(dict(network.state_dict()))}


def gguf(type_name: str, recipe: str, method: str) -> dict[str, str]:
    from gguf import GGUFReader

    from tests.helpers.gguf_files import write_model

    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "in.gguf", Path(temporary) / "out.gguf"
        write_model(source, num_layers=2, type_name=type_name)
        code = run_cli("gguf", str(source), str(out), "--for", recipe, "--method", method, "--seed", str(SEED))
        if code:
            return {"exit code": str(code)}
        sha256 = hashlib.sha256()
        for tensor in GGUFReader(out).tensors:
            sha256.update(tensor.name.encode() + tensor.data.tobytes())
        return {"weights": sha256.hexdigest()}


def work(job: list[str]) -> dict[str, str]:
    """Carry out one case with whatever package this process imports."""
    kind, *arguments = job
    return {"folder": folder, "loaded": loaded, "memory": memory, "gguf": gguf}[kind](*arguments)


def results_of(checkout: Path) -> dict[str, dict[str, str]]:
    """All cases with the package of a checkout, in one process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "TQDM_DISABLE": "1"}
    worker = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    process = subprocess.run(worker, env=environment, cwd=checkout, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(process.stdout.splitlines()[-1]))


def main() -> int:
    """Compare two checkouts, or be the worker of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        results = {}
        stdout, sys.stdout = sys.stdout, sys.stderr
        for name, job in cases():
            try:
                results[name] = work(job)
            except Exception as error:
                results[name] = {"error": type(error).__name__}
            print(name, results[name], file=sys.stderr, flush=True)
        print(json.dumps(results), file=stdout)
        return 0
    before, after = results_of(args.before), results_of(args.after)
    if args.out is not None:
        args.out.write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n", encoding="utf-8")
    for name in before:
        same = before[name] == after[name]
        print(f"{'same' if same else 'DIFFERS':8}{name:50}{next(iter(after[name].items()))}")
    num_same = sum(before[name] == after[name] for name in before)
    print(f"{num_same} of {len(before)} cases are the same, byte for byte")
    return 0 if num_same == len(before) else 1


if __name__ == "__main__":
    sys.exit(main())
