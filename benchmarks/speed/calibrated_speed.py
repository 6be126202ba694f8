"""`feedback` beside GPTQModel on the same model and the same calibration tokens, both in this run.

    python -m benchmarks.speed.calibrated_speed [--model examples/models/clean] [--method 'feedback(width=0)']

Run it where GPTQModel is installed: in the environment of `.ci/test-gptq`. Both have the model loaded and the tokens
ready; what is timed is the guard, and `GPTQModel.quantize`, each as the first work of a process of its own: GPTQModel's
threads stay, and halve the speed of what comes after them. Both have run once before, so kernels are compiled and files
are in memory. Divergence is the mean KL from the full-precision model on passages that neither was calibrated with: of
GPTQModel's model, of the guarded weights, and of what GPTQModel stores when it is given those. The guard's figures are
means over seeds. `--hidden` makes a Llama of random weights of that width instead: for the time, since its divergence
means little.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks._common import MODELS_DIR, add_json, parser_of, seconds_of, write_json
from qcbguard_plugins import Calibration, Guard, guard_model
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.models.calibration import calibration_tokens

MODEL = MODELS_DIR / "clean"
BITS, GROUP_SIZE = 4, 128
NUM_HELD_OUT = 16


def random_model(folder: Path, hidden: int, num_layers: int) -> None:
    """A Llama of random weights with the tokenizer of the example models."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 128 * 128,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """float32 ``[num_sequences, length, vocab_size]``."""
    return torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in tokens])


def quantize(folder: Path, tokens: torch.Tensor, target: Path) -> float:
    """Have GPTQModel quantize a model; returns the seconds that it took."""
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(str(folder), QuantizeConfig(bits=BITS, group_size=GROUP_SIZE), device="cpu")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    elapsed_s = seconds_of(lambda: loaded.quantize(rows, batch_size=1))
    loaded.save(str(target))
    return elapsed_s


def guard(folder: Path, method: Defense, calibration: Calibration, seed: int, target: Path) -> float:
    """Guard a model; returns the seconds that it took."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    settings = Guard(method, seed=seed, calibration=calibration)
    elapsed_s = seconds_of(lambda: guard_model(model, f"gptq-w{BITS}g{GROUP_SIZE}", settings, tokenizer=tokenizer))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return elapsed_s


def load(folder: Path) -> Any:
    """The model of a folder in float32, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32).eval()


def apart(work: Callable[..., float], *arguments: object) -> float:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    """Print times and divergences as JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--method", type=parse_defense, default="feedback")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    add_json(parser)
    args = parser.parse_args()
    if importlib.util.find_spec("gptqmodel") is None:
        sys.exit("skipped: GPTQModel is not installed; .ci/test-gptq makes an environment with it")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = args.model
        if args.hidden:
            folder = Path(name) / "random"
            random_model(folder, args.hidden, args.layers)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load(folder)
        settings = Calibration(num_sequences=args.sequences + NUM_HELD_OUT, sequence_length=128)
        tokens = calibration_tokens(settings, model.config, tokenizer)
        assert tokens is not None, "there is a tokenizer"
        used, held_out = tokens[:-NUM_HELD_OUT], tokens[-NUM_HELD_OUT:]
        full = log_probabilities(model, held_out)

        def kl(other: Path) -> float:
            found = log_probabilities(load(other), held_out)
            return float((full.exp() * (full - found)).sum(-1).mean())

        texts = [tokenizer.decode(row) for row in used]
        calibration = Calibration(source="texts", texts=texts, num_sequences=len(used), sequence_length=used.shape[1])
        work = Path(name)
        apart(quantize, folder, used, work / "warm-up-quantized")
        apart(guard, folder, args.method, calibration, 0, work / "warm-up-guarded")
        stock_s = apart(quantize, folder, used, work / "quantized")
        guarded_s = [
            apart(guard, folder, args.method, calibration, i, work / f"guarded-{i}") for i in range(args.seeds)
        ]
        for i in range(args.seeds):
            apart(quantize, work / f"guarded-{i}", used, work / f"stored-{i}")
        report = {
            "model": f"random, {args.hidden} wide" if args.hidden else folder.name,
            "num_weights": sum(parameter.numel() for parameter in model.parameters()),
            "tokens": used.numel(),
            "threads": torch.get_num_threads(),
            "stock": {"elapsed_s": stock_s, "kl": kl(work / "quantized")},
            "guard": {
                "elapsed_s": statistics.mean(guarded_s),
                "kl": statistics.mean(kl(work / f"guarded-{i}") for i in range(args.seeds)),
                "stored_kl": statistics.mean(kl(work / f"stored-{i}") for i in range(args.seeds)),
            },
        }
    print(write_json(report, args.json))


if __name__ == "__main__":
    main()
