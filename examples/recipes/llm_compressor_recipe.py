"""llm-compressor from a guarded folder: guard, quantize to W4A16, count the codes that are stored as planned."""

import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.grids import get_grid

FORMAT = "compressed-tensors:int4-g128"


def share_as_planned(guarded: Path, quantized: Path) -> float:
    """Quantize the folder with llm-compressor and compare what it saves."""
    oneshot(
        model=str(guarded),
        recipe=QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        output_dir=str(quantized),
    )
    grid = get_grid(FORMAT)
    source, stored = load_file(guarded / "model.safetensors"), load_file(quantized / "model.safetensors")
    equal = total = 0
    for key, packed in stored.items():
        if key.endswith(".weight_packed"):
            weight = source[key.removesuffix("_packed")]
            codes = unpack_from_int32(packed, 4, torch.Size(weight.shape)).to(torch.int16) + grid.num_levels // 2
            equal += int((codes == grid.quantize(weight)).sum())
            total += weight.numel()
    return equal / total


def main(model: str, method: str = "feedback") -> int:
    """Guard, quantize, compare; 0 if at least 99 % of the codes are those planned."""
    with tempfile.TemporaryDirectory() as folder:
        guard_checkpoint(model, Path(folder) / "guarded", [FORMAT], method)
        share = share_as_planned(Path(folder) / "guarded", Path(folder) / "quantized")
    print(f"llm-compressor stores {share:.3%} of the codes as planned")
    return 0 if share >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
