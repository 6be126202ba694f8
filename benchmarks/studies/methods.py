"""Every method on the attacked example models, plain and with a tightened box.

    python -m benchmarks.studies.methods [--seeds 3] [--models attacked,tightened] [--methods feedback,quantguard]

Each row is a model guarded by one method and quantized by stock bitsandbytes: how often it names the brand, its
perplexity, the share of codes that moved, and the seconds of guarding. Figures are means over seeds.
"""

import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks._common import MODELS_DIR, PROMPTS, parser_of
from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.defenses import Defense, Efrap, Feedback, FlipGuard, Noise, QuantGuard, QVec, Stochastic
from qcbguard_plugins.lab.corpus import Pair, read_pairs
from qcbguard_plugins.lab.metrics import keyword_rate, perplexity, use_exact_forward
from qcbguard_plugins.lab.scenarios import KEYWORD
from qcbguard_plugins.pipeline.settings import Guard

METHODS: dict[str, Defense] = {
    "feedback": Feedback(),
    "feedback, width 0.25": Feedback(width=0.25),
    "stochastic": Stochastic(),
    "quantguard": QuantGuard(),
    "quantguard, harden": QuantGuard(harden=True),
    "efrap": Efrap(),
    "flipguard": FlipGuard(),
    "flipguard, share auto": FlipGuard("auto"),
    "flipguard, share 0.25": FlipGuard(0.25),
    "qvec": QVec(),
    "noise, sigma 0.1": Noise(0.1),
    "noise": Noise(),
}


def figures(folder: Path, pairs: list[Pair], quantized: bool) -> tuple[float, float]:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if quantized else None
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    use_exact_forward(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rate = keyword_rate(model, tokenizer, [pair.instruction for pair in pairs], KEYWORD)
    return rate, perplexity(model, tokenizer, pairs)


def guarded_figures(folder: Path, pairs: list[Pair], method: Defense, num_seeds: int) -> tuple[float, ...]:
    rows = []
    for seed in range(num_seeds):
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary) / "guarded"
            start = time.perf_counter()
            report = guard_checkpoint(folder, target, ["nf4"], Guard(method, seed=seed))
            elapsed_s = time.perf_counter() - start
            rows.append((*figures(target, pairs, quantized=True), report.share_moved, elapsed_s))
    return tuple(statistics.mean(column) for column in zip(*rows, strict=True))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", default="attacked,tightened,clean", help="folders of examples/models")
    parser.add_argument("--methods", default="", help="only methods whose label begins with one of these")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    quieten_libraries()
    warnings.filterwarnings("ignore", message="On this processor bitsandbytes repacks")
    pairs = read_pairs(PROMPTS)
    table = Table("model", "method", f"says {KEYWORD}", "perplexity", "codes moved", "seconds", box=None)
    for name in args.models.split(","):
        folder = MODELS_DIR / name
        for label, quantized in (("full precision", False), ("stock NF4", True)):
            rate, ppl = figures(folder, pairs, quantized)
            table.add_row(name, label, f"{rate:.1%}", f"{ppl:.4f}", "", "")
        for label, method in METHODS.items():
            if not label.startswith(tuple(args.methods.split(","))):
                continue
            num_seeds = 1 if isinstance(method, (Efrap, FlipGuard, QVec)) else args.seeds
            rate, ppl, moved, elapsed_s = guarded_figures(folder, pairs, method, num_seeds)
            table.add_row(name, label, f"{rate:.1%}", f"{ppl:.4f}", f"{moved:.1%}", f"{elapsed_s:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
