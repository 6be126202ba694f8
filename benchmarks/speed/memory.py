"""The memory that a dry run states beside what the run takes.

python -m benchmarks.speed.memory --hidden 512 --intermediate 1408 --layers 16 --dtype float32 --method feedback
python -m benchmarks.speed.memory --layers 3 --method stochastic --max-memory 800MB
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks._common import parser_of
from benchmarks.speed import checkpoint_speed

_VOCAB = 255


def make(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """A checkpoint of random weights with a tokenizer of numbered words, and a text of such words."""
    source, text = folder / "source", folder / "text.txt"
    source.mkdir()
    itemsize = getattr(torch, arguments.dtype).itemsize
    hidden, intermediate = arguments.hidden, arguments.intermediate
    checkpoint_speed.HIDDEN, checkpoint_speed.INTERMEDIATE = hidden, intermediate
    block_bytes = (4 * hidden**2 + 3 * hidden * intermediate) * itemsize
    checkpoint_speed.make_checkpoint(source, block_bytes * arguments.layers, arguments.dtype)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, **json.loads(index.read_text())}))
    words = {f"w{i}": i for i in range(_VOCAB)} | {"<unk>": _VOCAB}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(source)
    text.write_text(" ".join(f"w{random.randrange(_VOCAB)}" for _ in range(arguments.words)))
    return source, text


def main() -> None:
    parser = parser_of(__doc__, whole=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--method", default="stochastic")
    parser.add_argument("--words", type=int, default=1100, help="length of the calibration text")
    parser.add_argument("--max-memory", help="the budget; none by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source, text = make(Path(name), arguments)
        command = ["-m", "qcbguard_plugins.cli", "guard", str(source), "--for", arguments.format]
        command += ["--method", arguments.method, "--seed", "0", "--calibration", str(text)]
        command += ["--max-memory", arguments.max_memory] if arguments.max_memory else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        dry_run = [sys.executable, *command, "--dry-run", "--json", "-"]
        stated = json.loads(subprocess.run(dry_run, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        done = checkpoint_speed.run([*command, "--out", f"{name}/out"], 1)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    report = {
        "checkpoint_bytes": size,
        "streamed": stated["streamed"],
        "stated_bytes": stated["peak_bytes"],
        "measured_bytes": done["peak_bytes"],
        "stated_over_measured": stated["peak_bytes"] / done["peak_bytes"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
