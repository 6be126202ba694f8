"""llm-compressor from a guarded folder, rounding to nearest (W4A16)."""

import tempfile
from pathlib import Path

import torch
from comparison import Quantized, run
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def quantize(folder: Path) -> Quantized:
    """The model and its codes."""
    rounding = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    with tempfile.TemporaryDirectory() as quantized:
        oneshot(model=str(folder), output_dir=quantized, recipe=rounding)
        return read_back(Path(quantized))


def read_back(quantized: Path) -> Quantized:
    """A folder that llm-compressor wrote in 4 bits."""
    stored = load_file(quantized / "model.safetensors")
    codes = {}
    for key, packed in stored.items():
        if key.endswith(".weight_packed"):
            shape = torch.Size(stored[key.replace("_packed", "_shape")].tolist())
            # They are signed.
            codes[key.removesuffix(".weight_packed")] = unpack_from_int32(packed, 4, shape).to(torch.int16) + 8
    return AutoModelForCausalLM.from_pretrained(quantized), codes


if __name__ == "__main__":
    run("llm-compressor", "compressed-tensors:int4-g128", quantize)
