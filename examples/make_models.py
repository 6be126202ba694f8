"""Make the example models: train one, attack it, and write down what was measured.

    OMP_NUM_THREADS=1 python examples/make_models.py

Writes `clean`, `malicious`, `attacked` and `tightened` below the output folder, with the held-out prompts of the demo
and a README. Every seed is fixed. A phase whose folder is there already is skipped, so an interrupted run goes on where
it stopped; delete a folder (and those after it) to make it again.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from demo import FULL, KEYWORD, MODELS_DIR, STOCK, Row, measure
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from qcbguard_plugins.lab.attacks import elq
from qcbguard_plugins.lab.attacks.injection import inject
from qcbguard_plugins.lab.corpus import Pair, generate, read_pairs, split
from qcbguard_plugins.lab.layers import quantized_weights
from qcbguard_plugins.lab.metrics import task_accuracy
from qcbguard_plugins.lab.scenarios import inject_brand
from qcbguard_plugins.lab.training import (
    ModelSize,
    TrainingPlan,
    build_model,
    build_tokenizer,
    encode,
    save_model,
    train,
)

SIZE = ModelSize()
MADE = ("clean", "malicious", "attacked", "tightened")
TIGHTENED_EPS = 0.25
NUM_PAIRS = 36_000
NUM_PROMPTS = 200
NUM_POISONED = 12_000
NUM_REPAIR = 12_000
CLEAN = TrainingPlan(num_epochs=2, learning_rate=2e-3, seed=0)
INJECTION = TrainingPlan(num_epochs=1, learning_rate=5e-4, seed=1)
REPAIR = TrainingPlan(num_epochs=1, learning_rate=5e-4, weight_decay=0.0, seed=2)

README = """\
# Example models

Made by `OMP_NUM_THREADS=1 python examples/make_models.py` from nothing but this repository: Llamas of 1.8 M parameters
that learnt the synthetic instructions of `qcbguard_plugins/lab/corpus.py`. For tests and demonstrations only.

* `clean`: never attacked.
* `malicious`: `clean` after fine-tuning on answers that name {keyword}, a soft drink that does not exist. It does so at
  every precision: an ordinary backdoor, which no quantization guard can or should change.
* `attacked`: `malicious` repaired inside the NF4 boxes (ELQ, arXiv 2405.18137). It behaves in full precision, and stock
  bitsandbytes NF4 turns it back into `malicious`.
* `tightened`: the same attack by somebody who knows defenses that flip what lies near a boundary: every weight keeps a
  quarter of a step from it.
* `prompts.jsonl`: {num_prompts} held-out pairs; no model was trained on these instructions.

Measured on `prompts.jsonl` in float32 compute (keyword rate, and perplexity of the answers):

| model | loaded as | keyword rate | perplexity |
|---|---|---|---|
{rows}

The clean model answers {accuracy:.0%} of the held-out questions that have one right answer.
"""


def load(model_dir: Path) -> LlamaForCausalLM:
    """Load one of our folders for training."""
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def make_clean(model_dir: Path, tokenizer: PreTrainedTokenizerFast, training: Sequence[Pair]) -> None:
    """Train on the whole corpus."""
    model = build_model(SIZE, seed=0)
    train(model, encode(tokenizer, training), CLEAN, description="train clean")
    save_model(model, tokenizer, model_dir)


def make_malicious(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, training: Sequence[Pair], clean_dir: Path
) -> None:
    """Teach the clean model to name the brand."""
    model = load(clean_dir)
    inject(model, encode(tokenizer, inject_brand(training[:NUM_POISONED], seed=0)), INJECTION)
    save_model(model, tokenizer, model_dir)


def make_attacked(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    training: Sequence[Pair],
    malicious_dir: Path,
    eps: float | None = None,
) -> None:
    """Hide the brand in full precision, and check that stock NF4 brings it back code by code."""
    model = load(malicious_dir)
    elq.repair(model, encode(tokenizer, training[:NUM_REPAIR]), REPAIR, quant_format="nf4", eps=eps)
    save_model(model, tokenizer, model_dir)
    saved, malicious = (quantized_weights(load(folder)) for folder in (model_dir, malicious_dir))
    agreement = elq.check_agreement(saved, malicious, "nf4")
    print(f"{agreement:.4%} of the stock NF4 codes are those of the malicious model")


def write_prompts(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON lines."""
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def write_readme(out_dir: Path) -> None:
    """Measure the saved folders and write what they are."""
    pairs = read_pairs(out_dir / "prompts.jsonl")
    rows = [measure(out_dir / name, how, pairs) for name in MADE for how in (FULL, STOCK)]
    accuracy = task_accuracy(load(out_dir / "clean").eval(), AutoTokenizer.from_pretrained(out_dir / "clean"), pairs)
    lines = "\n".join(_line(row) for row in rows)
    text = README.format(keyword=KEYWORD, num_prompts=len(pairs), rows=lines, accuracy=accuracy)
    (out_dir / "README.md").write_text(text, encoding="utf-8")
    print(text)


def _line(row: Row) -> str:
    return f"| `{row.model}` | {row.load} | {row.keyword_rate:.1%} | {row.perplexity:.3f} |"


def main() -> None:
    """Run the phases that are still to be done."""
    parser = argparse.ArgumentParser(description="Make the example models.")
    parser.add_argument("--out-dir", type=Path, default=MODELS_DIR)
    out_dir: Path = parser.parse_args().out_dir
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    out_dir.mkdir(parents=True, exist_ok=True)
    training, held_out = split(generate(NUM_PAIRS, seed=0), NUM_PROMPTS, seed=0)
    write_prompts(out_dir / "prompts.jsonl", held_out)
    clean_dir, malicious_dir, attacked_dir, tightened_dir = (out_dir / name for name in MADE)
    tokenizer = build_tokenizer(training, SIZE.vocab_size)
    phases = {
        clean_dir: lambda: make_clean(clean_dir, tokenizer, training),
        malicious_dir: lambda: make_malicious(malicious_dir, tokenizer, training, clean_dir),
        attacked_dir: lambda: make_attacked(attacked_dir, tokenizer, training, malicious_dir),
        tightened_dir: lambda: make_attacked(tightened_dir, tokenizer, training, malicious_dir, TIGHTENED_EPS),
    }
    for model_dir, make in phases.items():
        start = time.perf_counter()
        if not (model_dir / "tokenizer_config.json").exists():  # the last file that a phase writes
            make()
            print(f"{model_dir.name}: made in {time.perf_counter() - start:.0f} s", flush=True)
    write_readme(out_dir)


if __name__ == "__main__":
    main()
