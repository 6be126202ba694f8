"""Every model family of transformers, tiny and random: stock bitsandbytes and the guard, side by side.

    python -m benchmarks.studies.zoo walk --kinds causal vision-language --out zoo.jsonl
    python -m benchmarks.studies.zoo page zoo.jsonl --out docs/zoo.md

A family counts when its tiny model is built, its own forward pass runs and stock loads it. The guard manages it when it
quantizes the modules that stock quantizes, the forward pass is finite, and the model that is saved and loaded again by
stock is the same. One process walks over all; a model that takes too long is noted as such.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.studies.tiny_families import KINDS, VOCAB_SIZE, Family, families, outputs, working_inputs
from qcbguard_plugins import Calibration, Feedback, Guard, GuardedBitsAndBytesConfig, Stochastic
from qcbguard_plugins.models.calibration import builtin_texts
from qcbguard_plugins.pipeline.plan import make_plan

_TIME_LIMIT_S = 60
# Families whose fields leave them larger than this say little more and take the time of many.
_MOST_PARAMETERS = 12_000_000
_FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}
_METHODS = ("stochastic", "feedback")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    walk_parser = commands.add_parser("walk")
    walk_parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    walk_parser.add_argument("--formats", nargs="+", default=["nf4"], choices=list(_FORMATS))
    walk_parser.add_argument("--only", nargs="+", default=[], help="model types")
    walk_parser.add_argument("--out", type=Path, required=True)
    walk_parser.set_defaults(run=lambda a: walk(a.kinds, a.formats, a.only, a.out))
    page_parser = commands.add_parser("page")
    page_parser.add_argument("results", type=Path)
    page_parser.add_argument("--out", type=Path, required=True)
    page_parser.set_defaults(run=lambda a: a.out.write_text(page(a.results), encoding="utf-8"))
    arguments = parser.parse_args()
    arguments.run(arguments)


def walk(kinds: Sequence[str], formats: Sequence[str], only: Sequence[str], out: Path) -> None:
    """Try the families one after the other and append a line for each that the file does not hold yet."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    known = {(row.get("type"), row.get("class")) for row in read_lines(out)} if out.exists() else set()
    with out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"machine": machine(), "formats": list(formats), "kinds": list(kinds)}) + "\n")
        for family in families(kinds):
            if (only and family.model_type not in only) or (family.model_type, family.class_name) in known:
                continue
            start = time.monotonic()
            row: dict[str, Any] = {"kind": family.kind, "type": family.model_type, "class": family.class_name}
            try:
                with time_limit(_TIME_LIMIT_S):
                    row |= try_family(family, formats, tokenizer)
            except Exception as error:  # the walk goes on whatever a family does
                row["not"] = described(error)
            row["seconds"] = round(time.monotonic() - start, 1)
            lines.write(json.dumps(row) + "\n")
            lines.flush()


def try_family(family: Family, formats: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Build a family's model and load it in all ways."""
    try:
        model = family.build()
    except Exception as error:  # a configuration that the shrinking breaks
        return {"not": f"built ({described(error)})"}
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMETERS:
        return {"not": "small after shrinking"}
    inputs = working_inputs(model)
    if inputs is None:
        return {"not": "run on any of the guessed inputs"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found: dict[str, Any] = {}
        for format_name in formats:
            arguments = _FORMATS[format_name]
            stock = load(type(model), folder, BitsAndBytesConfig(**arguments))
            if not quantized(stock):
                return {"not": "quantized by stock in any layer"}
            found[f"{format_name}, folder's plan"] = {"problem": plan_problem(folder, format_name, stock)}
            for method in _METHODS:
                own = Calibration(num_sequences=8, sequence_length=64)
                defense = Stochastic() if method == "stochastic" else Feedback()
                guard = Guard(defense, seed=7, calibration=own, cache_dir=Path(temporary) / "cache")
                config = GuardedBitsAndBytesConfig(**arguments, guard=guard)
                found[f"{format_name}, {method}"] = outcome(type(model), folder, config, stock, inputs)
        return found


def plan_problem(folder: Path, format_name: str, stock: Any) -> str:
    """Whether ``qcbguard guard`` would take the modules of the folder that stock quantizes."""
    try:
        planned = {target.layer for target in make_plan(folder, format_name).targets}
    except Exception as error:  # counted as well
        return described(error)
    other = sorted(planned ^ quantized(stock))
    return f"other modules than stock: {', '.join(other[:3])}" if other else ""


def outcome(cls: Any, folder: Path, config: Any, stock: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Load guarded and compare with stock; ``problem`` is empty where all is as it should be."""
    try:
        guarded = load(cls, folder, config)
    except Exception as error:  # the very thing that is counted
        return {"problem": described(error)}
    report = guarded.hf_quantizer.guard_report
    free = {why: len(names) for why, names in report.data_free.items()}
    found = {"layers": len(report.tensors), "data_free": sum(free.values()), "reasons": free, "problem": ""}
    if quantized(guarded) != quantized(stock):
        return found | {"problem": "other modules than stock"}
    if {record.name for record in report.tensors} != {f"{name}.weight" for name in quantized(stock)}:
        return found | {"problem": "the report names other modules"}
    if not survives(guarded) and survives(stock):
        return found | {"problem": "saved and loaded again it differs, and stock does not"}
    if finite(stock, inputs) and not finite(guarded, inputs):
        return found | {"problem": "the forward pass is not finite"}
    return found


def survives(model: Any) -> bool:
    """Whether a model that is saved and loaded again is the same; some checkpoint formats cannot hold stock's."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(Exception):
        model.save_pretrained(temporary)
        return same_state(model, load(type(model), Path(temporary), None))
    return False


def load(cls: Any, folder: Path, config: Any) -> Any:
    torch.manual_seed(0)
    more = {} if config is None else {"quantization_config": config}
    model = cls.from_pretrained(folder, local_files_only=True, **more)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its kernel takes only some widths, guarded or not
    return model.eval()


def quantized(model: Any) -> set[str]:
    """Names of the modules that bitsandbytes has quantized."""
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Linear4bit) and isinstance(module.weight, Params4bit) and module.weight.bnb_quantized)
        or (isinstance(module, Linear8bitLt) and module.weight.dtype == torch.int8)
    }


def same_state(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if isinstance(a[key], torch.Tensor))


def finite(model: Any, inputs: dict[str, Any]) -> bool:
    with contextlib.suppress(Exception):
        return all(bool(torch.isfinite(value).all()) for value in outputs(model, inputs))
    return False


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the built-in text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Some ids are left for the special tokens that the shrunk configurations have.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 40, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(builtin_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def described(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} [{Path(where.filename).name}:{where.lineno}]"


def machine() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    return {"processor": platform.processor() or platform.machine(), "commit": commit.stdout.strip(), **versions}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(results: Path) -> str:
    """The table and the list of what does not work, in Markdown."""
    parts = read_lines(results)
    runs = [part for part in parts if "machine" in part]
    rows = [part for part in parts if "class" in part]
    columns = list(dict.fromkeys(key for row in rows for key in row if ", " in key))
    lines = [
        "# The zoo: every model family of transformers, tiny and random",
        "",
        __doc__.split("\n\n", 2)[2].strip().replace("\n", " "),
        "",
        f"transformers {runs[-1]['machine']['transformers']}, torch {runs[-1]['machine']['torch']}, one thread of "
        f"{runs[-1]['machine']['processor']}, commit {', '.join(sorted({run['machine']['commit'] for run in runs}))}. "
        "A kind that is not in the table was not walked, and one with few families not to its end:",
        "",
        "    python -m benchmarks.studies.zoo walk --out zoo.jsonl --formats "
        + " ".join(dict.fromkeys(name for run in runs for name in run["formats"])),
        "    python -m benchmarks.studies.zoo page zoo.jsonl --out docs/zoo.md",
        "",
        "| kind | families tried | count | " + " | ".join(columns) + " | layers calibrated, of all |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        tried = [row for row in of_kind if "not" not in row]
        cells = []
        for column in columns:
            here = [row[column] for row in tried if column in row]
            cells.append(f"{sum(not cell['problem'] for cell in here)} of {len(here)}")
        layers = [row["nf4, feedback"] for row in tried if "layers" in row.get("nf4, feedback", {})]
        total, free = sum(cell["layers"] for cell in layers), sum(cell["data_free"] for cell in layers)
        lines.append(f"| {kind} | {len(of_kind)} | {len(tried)} | {' | '.join(cells)} | {total - free} of {total} |")
    lines += ["", "## What does not work", ""]
    broken = [(row, column) for row in rows for column in columns if row.get(column, {}).get("problem")]
    lines += [f"* {row['class']}, {column}: {row[column]['problem']}" for row, column in broken] or ["Nothing."]
    lines += ["", "## Why layers are guarded without data", ""]
    reasons = Counter[str]()
    for row in rows:
        reasons.update(row.get("nf4, feedback", {}).get("reasons", {}))
    lines += [f"* {count} layers: {why}" for why, count in reasons.most_common(20)]
    lines += ["", "## Families that do not count", ""]
    lines += [f"* {row['class']} is not {row['not']}" for row in rows if "not" in row]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
