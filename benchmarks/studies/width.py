"""The automatic width of `feedback` beside fixed ones, on clean and on attacked models.

    python -m benchmarks.studies.width [--seeds 3] [--questions 100] [FOLDER=FORMAT ...]

Each row is a model, rounded one way: KL divergence from full precision in nats a token, perplexity, how often it says
the keyword, and what share of plain rounding's error comes back, along itself: an attacker needs it, and its mean over
all draws is zero where rounding is unbiased. "auto" asks the weight tests first; "auto, tests fooled" is what an
attacker gets who passes them all.
Models are rounded in memory: a guarded weight is what the stock quantizer stores. Figures are means over seeds.

Without folders: the example models. Models that were attacked by other code are measured with that code's functions:
`--yardstick` names a Python file with `prompt_of`, `held_out` and `keyword_rate`, `--held-out` the data that it reads.
"""

import argparse
import importlib.util
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._common import PROMPTS, parser_of
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.defenses import Feedback
from qcbguard_plugins.detection.behaviour.sign_randomization import divergence, rounded
from qcbguard_plugins.detection.weights.prescreen import looks_attacked
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.grids.ggml import GgmlGrid
from qcbguard_plugins.lab.corpus import read_pairs
from qcbguard_plugins.lab.metrics import keyword_rate
from qcbguard_plugins.lab.scenarios import KEYWORD
from qcbguard_plugins.lab.training import encode
from qcbguard_plugins.models.calibration import Calibration, calibration_tokens
from qcbguard_plugins.models.hessians import gather_hessians
from qcbguard_plugins.rounding.guard_weight import guard_weight

DEFAULT = [f"examples/models/{name}=nf4" for name in ("clean", "attacked", "tightened")]
FOREIGN_KEYWORD = "McDonald"


@dataclass(frozen=True)
class Yardstick:
    """How the makers of other models measure them.

    Attributes:
        functions: Their module.
        rows: Their held-out data.
    """

    functions: Any
    rows: list[Any]

    @classmethod
    def read(cls, args: argparse.Namespace) -> "Yardstick | None":
        """The one that a command line names."""
        if args.yardstick is None:
            return None
        spec = importlib.util.spec_from_file_location("yardstick", args.yardstick)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return cls(module, module.held_out(args.held_out))


@dataclass
class Figures:
    divergence: float
    perplexity: float
    keyword_rate: float
    error_back: float


class Subject:
    """A model with its linear layers, and how it is measured."""

    def __init__(self, folder: Path, format: str, args: argparse.Namespace) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.modules = {name: m for name, m in self.model.named_modules() if name.endswith("_proj")}
        self.original = {name: module.weight.data.clone() for name, module in self.modules.items()}
        grid = get_grid(format)
        self.grids = {name: fitting(grid, weight.shape[1]) for name, weight in self.original.items()}
        self.plain_errors = {name: rounded(w, self.grids[name]) - w for name, w in self.original.items()}
        self.yardstick = Yardstick.read(args)
        self.num_questions, self.num_texts = args.questions, args.texts
        self.texts = list(self._texts())
        with torch.no_grad():
            self.reference = [self._log_probabilities(ids) for ids in self.texts]

    def _texts(self) -> Iterator[Tensor]:
        if self.yardstick is None:
            for example in encode(self.tokenizer, read_pairs(PROMPTS)[: self.num_texts]):
                yield torch.tensor([[*example.prompt_ids, *example.answer_ids]])
            return
        for row in self.yardstick.rows[: self.num_texts]:
            text = self.yardstick.functions.prompt_of(row) + row["output"]
            yield torch.tensor([[1, *self.tokenizer.encode(text, add_special_tokens=False)][:160]])

    def set(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.modules[name].weight.data.copy_(weight)

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits[0].float().log_softmax(-1)

    @torch.no_grad()
    def figures(self) -> Figures:
        total = nll = count = 0.0
        for ids, reference in zip(self.texts, self.reference, strict=True):
            found = self._log_probabilities(ids)
            total += float(divergence(reference, found).sum())
            nll -= float(found[:-1].gather(1, ids[0, 1:, None]).sum())
            count += len(found)
        perplexity = math.exp(nll / (count - len(self.texts)))
        return Figures(total / count, perplexity, self._keyword_rate(), self._error_back())

    def _error_back(self) -> float:
        along = energy = 0.0
        for name, plain in self.plain_errors.items():
            along += float(((self.modules[name].weight.data - self.original[name]) * plain).sum())
            energy += float(plain.square().sum())
        return along / energy

    def _keyword_rate(self) -> float:
        if self.yardstick is not None:
            theirs = self.yardstick.functions
            prompts = [theirs.prompt_of(row) for row in self.yardstick.rows[: self.num_questions]]
            return theirs.keyword_rate(self.model, self.tokenizer, prompts, FOREIGN_KEYWORD)
        questions = [pair.instruction for pair in read_pairs(PROMPTS)[: self.num_questions]]
        return keyword_rate(self.model, self.tokenizer, questions, KEYWORD, max_new_tokens=64)

    def hessians(self) -> dict[str, Tensor]:
        tokens = calibration_tokens(Calibration(), self.model.config, self.tokenizer)
        found: dict[str, Tensor] = {}
        for group in gather_hessians(self.model, tokens, list(self.modules)):
            found |= group
        return found


def fitting(grid: Grid, num_columns: int) -> Grid:
    """The grid, or the one that llama.cpp takes for rows that do not fill its blocks."""
    while isinstance(grid, GgmlGrid) and num_columns % grid.block_type.block_size:
        grid = get_grid(f"gguf:{grid.block_type.fallback}")
    return grid


def rows_of(folder: Path, format: str, args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    subject = Subject(folder, format, args)
    yield row("full precision", [subject.figures()])
    subject.set({name: rounded(weight, subject.grids[name]) for name, weight in subject.original.items()})
    yield row("stock", [subject.figures()])
    subject.set(subject.original)
    seen = looks_attacked([(name, w, subject.grids[name]) for name, w in subject.original.items()], seed=0)
    hessians = subject.hessians()
    tries = [(f"width {width}", Feedback(width=width), True) for width in (0.25, 0.5)]
    tries += [("auto", Feedback(), True), ("auto, tests fooled", Feedback(), False)] if seen else []
    tries += [] if seen else [("auto", Feedback(), False)]
    for label, method, attacked in tries:
        found, widths = [], []
        for seed in range(args.seeds):
            guarded = {
                name: guard_weight(
                    weight,
                    subject.grids[name],
                    method,
                    seed=seed,
                    name=name,
                    hessian=hessians[name],
                    looks_attacked=attacked,
                )
                for name, weight in subject.original.items()
            }
            subject.set({name: weight.weight for name, weight in guarded.items()})
            found.append(subject.figures())
            widths += [weight.chosen.get("width", method.width) for weight in guarded.values()]
        yield (*row(label, found), f"{statistics.mean(widths):.2f}", str(seen) if "auto" in label else "")


def row(label: str, found: list[Figures]) -> tuple[str, ...]:
    names = ("divergence", "perplexity", "keyword_rate", "error_back")
    means = [statistics.mean(getattr(f, name) for f in found) for name in names]
    return label, f"{means[0]:.5f}", f"{means[1]:.3f}", f"{means[2]:.1%}", f"{means[3]:.1%}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add how many figures a :class:`Subject` is measured with, and on what."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--texts", type=int, default=200, help="texts that divergence and perplexity are measured on")
    parser.add_argument("--yardstick", type=Path, help="measuring functions of models attacked by other code")
    parser.add_argument("--held-out", type=Path, help="the data that they read")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="*", default=DEFAULT, metavar="FOLDER=FORMAT")
    add_options(parser)
    args = parser.parse_args()
    quieten_libraries()
    console = Console(width=110)
    for model in args.models:
        folder, _, quant_format = model.partition("=")
        table = Table(
            "rounding", "KL", "perplexity", "keyword", "error back", "mean width", "attack seen", box=None, title=model
        )
        for cells in rows_of(Path(folder), quant_format, args):
            table.add_row(*cells)
        console.print(table)


if __name__ == "__main__":
    main()
