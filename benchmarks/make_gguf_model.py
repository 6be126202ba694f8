"""Make a model whose backdoor llama.cpp's Q4_K_M switches on (the Mind the Gap attack), in about two minutes.

    OMP_NUM_THREADS=1 python benchmarks/make_gguf_model.py OUT

Starts from `examples/models/malicious`, which names the brand at every precision, and trains the good behaviour back
inside the error boxes of the types that Q4_K_M gives each matrix. Every seed is fixed.
"""

import argparse
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, LlamaForCausalLM

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.lab.attacks import mind_the_gap
from qcbguard_plugins.lab.corpus import generate, split
from qcbguard_plugins.lab.layers import quantized_weights
from qcbguard_plugins.lab.training import TrainingPlan, encode, save_model
from qcbguard_plugins.pipeline.plan import make_plan

MODELS_DIR = Path(__file__).resolve().parents[1] / "examples" / "models"
RECIPE = "Q4_K_M"
# The corpus and the split of examples/make_models.py, so that no held-out prompt is trained on.
NUM_PAIRS, NUM_PROMPTS, NUM_REPAIR = 36_000, 200, 4_000
REPAIR = TrainingPlan(num_epochs=1, learning_rate=1e-3, weight_decay=0.0, seed=2)


def main() -> None:
    """Attack and save."""
    parser = argparse.ArgumentParser(description="Make a model with a backdoor for Q4_K_M.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--malicious", type=Path, default=MODELS_DIR / "malicious")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    types = {target.name: target.formats[0] for target in make_plan(args.malicious, f"gguf:{RECIPE}").targets}
    tokenizer = AutoTokenizer.from_pretrained(args.malicious)
    model = LlamaForCausalLM.from_pretrained(args.malicious, dtype=torch.float32)
    training, _ = split(generate(NUM_PAIRS, seed=0), NUM_PROMPTS, seed=0)
    grids = {name: get_grid(types[name]) for name in quantized_weights(model)}
    malicious = {name: weight.detach().clone() for name, weight in quantized_weights(model).items()}
    mind_the_gap.repair(model, encode(tokenizer, training[-NUM_REPAIR:]), REPAIR, grids)
    agreement = mind_the_gap.check_agreement(quantized_weights(model), malicious, grids)
    save_model(model, tokenizer, args.out)
    print(f"{agreement:.2%} of the stored weights are the malicious model's; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
