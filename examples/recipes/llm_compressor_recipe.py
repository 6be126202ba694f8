"""llm-compressor from a guarded folder: guard, quantize to W4A16, count the codes that are stored as planned."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.grids import get_grid


def share_as_planned(guarded: Path, quantized: Path, format_name: str, **oneshot_arguments: Any) -> float:
    """Quantize the folder with llm-compressor and compare what it saves."""
    oneshot(model=str(guarded), output_dir=str(quantized), **oneshot_arguments)
    grid = get_grid(format_name)
    source, stored = load_file(guarded / "model.safetensors"), load_file(quantized / "model.safetensors")
    equal = total = 0
    for key, packed in stored.items():
        if key.endswith(".weight_packed"):
            weight = source[key.removesuffix("_packed")]
            codes = unpack_from_int32(packed, 4, torch.Size(weight.shape)).to(torch.int16) + grid.num_levels // 2
            equal += int((codes == grid.quantize(weight)).sum())
            total += weight.numel()
    return equal / total


def guard_and_compare(model: str, method: str, format_name: str, **oneshot_arguments: Any) -> int:
    """Guard, quantize, compare; 0 if at least 99 % of the codes are those planned."""
    with tempfile.TemporaryDirectory() as folder:
        guarded, quantized = Path(folder) / "guarded", Path(folder) / "quantized"
        guard_checkpoint(model, guarded, [format_name], method)
        share = share_as_planned(guarded, quantized, format_name, **oneshot_arguments)
    print(f"llm-compressor stores {share:.3%} of the codes as planned")
    return 0 if share >= 0.99 else 1


def main(model: str, method: str = "feedback") -> int:
    """Round to nearest."""
    rounding = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    return guard_and_compare(model, method, "compressed-tensors:int4-g128", recipe=rounding)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
