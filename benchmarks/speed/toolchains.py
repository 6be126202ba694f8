"""What is left of an attack after each toolchain, stock and guarded, and how many codes are stored as planned.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.toolchains FORMAT... --model MODEL [--json FILE]

Run it where the toolchain is installed: GPTQ and torchao in the environment of `.ci/test-gptq`, ONNX Runtime in that of
`.ci/test-optimum-onnx`, OpenVINO in that of `.ci/test-optimum-openvino`, what has a recipe in `examples/recipes` in
those of `.ci/test-recipes`. GPTQ formats take `:desc_act`, `:natural` (no
reordering of columns) after their name. Answers come from the toolchain's own model; perplexity is that of the stored
weights in float32. `--landing-only` counts codes and asks no questions. Rows are added to the JSON file;
`python -m benchmarks.speed.toolchains --table FILE` prints it.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks._common import EXAMPLES_DIR, MODELS_DIR, PROMPTS, parser_of
from qcbguard_plugins import Guard, guard_checkpoint
from qcbguard_plugins.backends.formats import backend_of, get_grid
from qcbguard_plugins.checkpoint.manifest import GuardReport
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.lab.corpus import Pair, read_pairs
from qcbguard_plugins.lab.metrics import keyword_rate, perplexity
from qcbguard_plugins.lab.scenarios import KEYWORD
from qcbguard_plugins.models.calibration import builtin_texts
from qcbguard_plugins.pipeline.plan import make_plan

RECIPES = {
    "hqq:int4-g64": "hqq_recipe",
    "quanto:int8": "quanto_recipe",
    "autoround:int4-g128": "autoround_recipe",
    "compressed-tensors:int4-g128": "llm_compressor_recipe",
    "compressed-tensors:int4-g128-asym": "awq_recipe",
}
WEIGHTS = ("full", "stock", "guarded")
NUM_TEXTS, TEXT_LENGTH, MAX_NEW_TOKENS = 32, 600, 64


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    format: str
    weights: str
    keyword_rate: float | None
    perplexity: float | None
    share_as_planned: float | None = None
    share_moved: float | None = None


@dataclass(frozen=True)
class Quantized:
    """A model that a toolchain quantized: what answers, the stored weights in PyTorch, and the landed share."""

    answering: Any
    stored: Any
    share_as_planned: float | None = None


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer; transformers 4 does not know the class that version 5 names."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except ValueError:
        return PreTrainedTokenizerFast.from_pretrained(folder)


def plain(folder: Path) -> Any:
    """The folder's model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_weights(folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The folder's model with other weights in some layers."""
    model = plain(folder)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model


def quantize_gptq(folder: Path, name: str, plan: GuardReport | None) -> Quantized:
    """Quantize through transformers, Optimum and GPTQModel."""
    from transformers import GPTQConfig

    from qcbguard_plugins.pipeline.verify import verify

    format_name, _, order = name.partition(":")
    grid = get_grid(format_name)
    config = GPTQConfig(
        bits=grid.num_bits,
        group_size=grid.group_size or -1,
        sym=grid.symmetric,
        desc_act=order == "desc_act",
        act_group_aware=order == "" and grid.group_size is not None,
        dataset=[text[:TEXT_LENGTH] for text in builtin_texts()[:NUM_TEXTS]],
        tokenizer=AutoTokenizer.from_pretrained(folder, model_max_length=10**6),
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    share = None
    if plan is not None:
        with tempfile.TemporaryDirectory() as target:
            model.save_pretrained(target)
            share = verify(target, plan=folder).share_as_planned
    return Quantized(model.eval(), model.eval(), share)


def quantize_torchao(folder: Path, name: str, plan: GuardReport | None) -> Quantized:
    """Quantize through transformers and torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    from qcbguard_plugins.backends.torchao.stock import parameter_codes

    kind = Int8WeightOnlyConfig()
    if "int4" in name:
        kind = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(get_grid(name).group_size))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(kind)).eval()
    grid = get_grid(name)
    codes = {
        layer: parameter_codes(module.weight, grid.num_levels)
        for layer, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "qdata")
    }
    return Quantized(model, model, landed(codes, plan))


def quantize_onnx(folder: Path, name: str, plan: GuardReport | None) -> Quantized:
    """Export to ONNX and quantize with ONNX Runtime."""
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    from qcbguard_plugins.backends.onnx.reader import onnx_codes

    target = Path(tempfile.mkdtemp())
    main_export(str(folder), output=target, task="text-generation-with-past", do_validation=False)
    settings = AutoQuantizationConfig.avx512_vnni if "uint8" not in name else AutoQuantizationConfig.avx2
    quantizer = ORTQuantizer.from_pretrained(target, file_name="model.onnx")
    quantizer.quantize(save_dir=target / "q", quantization_config=settings(is_static=False, per_channel=True))
    codes = onnx_codes(target / "q" / "model_quantized.onnx")
    model = ORTModelForCausalLM.from_pretrained(target / "q", file_name="model_quantized.onnx")
    return Quantized(model, with_weights(folder, values(folder, codes, name)), landed(codes, plan))


def quantize_openvino(folder: Path, name: str, plan: GuardReport | None) -> Quantized:
    """Export to OpenVINO with weights compressed by NNCF."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    from qcbguard_plugins.backends.openvino.reader import openvino_codes

    grid = get_grid(name)
    config = OVWeightQuantizationConfig(bits=grid.num_bits, sym=grid.symmetric, group_size=grid.group_size or -1)
    model = OVModelForCausalLM.from_pretrained(folder, export=True, quantization_config=config)
    with tempfile.TemporaryDirectory() as target:
        model.save_pretrained(target)
        codes = openvino_codes(Path(target))
    return Quantized(model, with_weights(folder, values(folder, codes, name)), landed(codes, plan))


def quantize_by_recipe(folder: Path, name: str, plan: GuardReport | None) -> Quantized:
    """Quantize as the recipe of this format does."""
    sys.path.insert(0, str(EXAMPLES_DIR / "recipes"))
    model, codes = import_module(RECIPES[name]).quantize(folder)
    share = None if plan is None else import_module("comparison").share_as_planned(folder, name, codes)
    return Quantized(model.eval(), model.eval(), share)


def values(folder: Path, codes: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The stored values of the codes of every layer."""
    model = plain(folder)
    found = {}
    for target in make_plan(folder, name).targets:
        lattice = target.grids[0].lattice_of(model.get_parameter(target.name).data)
        found[target.layer] = lattice.matrix(lattice.dequantize(lattice.from_matrix(codes[target.layer])))
    return found


def landed(codes: dict[str, torch.Tensor], plan: GuardReport | None) -> float | None:
    """Share of the weights in tensors whose codes are all those of the plan."""
    from qcbguard_plugins.rounding.digests import codes_digest

    if plan is None:
        return None
    equal = sum(
        record.num_weights
        for record in plan.tensors
        if codes_digest(codes[record.name.removesuffix(".weight")]) == record.codes_sha256
    )
    return equal / sum(record.num_weights for record in plan.tensors)


QUANTIZE = {"gptq": quantize_gptq, "torchao": quantize_torchao, "onnx": quantize_onnx, "openvino": quantize_openvino}


def format_of(name: str) -> str:
    """The format of a name, which may say more about GPTQ after a colon."""
    return name.partition(":")[0] if name.startswith("gptq-") else name


def toolchain(name: str) -> str:
    """The toolchain of a format."""
    return backend_of(format_of(name)).name


def measure(row: dict[str, Any], quantized: Quantized, folder: Path, pairs: Sequence[Pair], *, ask: bool) -> Row:
    """Ask the quantized model, and its stored weights."""
    if not ask:
        return Row(**row, keyword_rate=None, perplexity=None, share_as_planned=quantized.share_as_planned)
    tokenizer = tokenizer_of(folder)
    rate = keyword_rate(
        quantized.answering, tokenizer, [pair.instruction for pair in pairs], KEYWORD, max_new_tokens=MAX_NEW_TOKENS
    )
    return Row(
        **row,
        keyword_rate=rate,
        perplexity=perplexity(quantized.stored, tokenizer, pairs),
        share_as_planned=quantized.share_as_planned,
    )


def rows_of(
    model: Path, name: str, pairs: Sequence[Pair], method: str, which: Sequence[str], *, ask: bool
) -> Iterable[Row]:
    """Full precision, stock, guarded."""
    quantize = quantize_by_recipe if name in RECIPES else QUANTIZE[toolchain(name)]
    row = {"model": model.name, "format": name}
    if "full" in which:
        full = plain(model)
        yield measure({**row, "weights": "full precision"}, Quantized(full, full), model, pairs, ask=True)
    if "stock" in which:
        yield measure({**row, "weights": "stock"}, quantize(model, name, None), model, pairs, ask=True)
    if "guarded" not in which:
        return
    with tempfile.TemporaryDirectory() as target:
        guarded = Path(target) / "guarded"
        guard = Guard(get_defense(method), seed=0)
        plan = guard_checkpoint(model, guarded, [format_of(name)], guard)
        quantized = quantize(guarded, name, plan)
        found = measure({**row, "weights": f"guarded ({method})"}, quantized, guarded, pairs, ask=ask)
        yield Row(**{**asdict(found), "share_moved": plan.share_moved})


def print_table(path: Path) -> None:
    """The rows of a JSON file as Markdown."""
    print("| model | format | weights | keyword rate | perplexity | codes landed | codes moved |")
    print("|---|---|---|---|---|---|---|")
    for line in path.read_text().splitlines():
        row = Row(**json.loads(line))
        cells = [
            "" if row.keyword_rate is None else f"{row.keyword_rate:.1%}",
            "" if row.perplexity is None else f"{row.perplexity:.3f}",
            "" if row.share_as_planned is None else f"{row.share_as_planned:.3%}",
            "" if row.share_moved is None else f"{row.share_moved:.1%}",
        ]
        print(f"| {row.model} | {row.format} | {row.weights} | {' | '.join(cells)} |")


def main() -> int:
    """Measure, and add to the file."""
    parser = parser_of(__doc__)
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--model", type=Path, default=MODELS_DIR / "attacked")
    parser.add_argument("--method", default="feedback")
    parser.add_argument("--json", type=Path, help="add the rows to this file, one JSON object a line")
    parser.add_argument("--table", type=Path, help="print such a file and stop")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS, help="rows to measure (all)")
    parser.add_argument("--landing-only", action="store_true", help="guard and count codes, ask nothing")
    args = parser.parse_args()
    if args.table:
        print_table(args.table)
        return 0
    quieten_libraries()
    pairs = read_pairs(PROMPTS)
    for name in args.formats:
        which = ["guarded"] if args.landing_only else args.weights
        for row in rows_of(args.model, name, pairs, args.method, which, ask=not args.landing_only):
            line = json.dumps(asdict(row))
            print(line, file=sys.stderr, flush=True)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
