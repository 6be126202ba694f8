"""AWQ from a guarded folder, by llm-compressor.

AWQ tries scales for the input columns, none at all among them, and keeps those that lower the error of the layer's
output. A guarded weight lies on the grid of asymmetric groups and has no error without a scale, so AWQ leaves it alone.
"""

import tempfile
from pathlib import Path

import torch
from comparison import Quantized, run
from datasets import Dataset
from llm_compressor_recipe import read_back
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

from qcbguard_plugins.models.calibration import builtin_texts

NUM_SEQUENCES, SEQUENCE_LENGTH = 32, 64


def quantize(folder: Path) -> Quantized:
    """The model and its codes."""
    if not torch.accelerator.is_available():
        # AWQ pins its calibration inputs for copies to an accelerator; torch refuses that where there is none.
        torch.Tensor.pin_memory = lambda self: self
    with tempfile.TemporaryDirectory() as quantized:
        oneshot(
            model=str(folder),
            output_dir=quantized,
            recipe=[AWQModifier(), QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"])],
            dataset=Dataset.from_dict({"text": list(builtin_texts())[:NUM_SEQUENCES]}),
            num_calibration_samples=NUM_SEQUENCES,
            max_seq_length=SEQUENCE_LENGTH,
        )
        return read_back(Path(quantized))


if __name__ == "__main__":
    run("AWQ", "compressed-tensors:int4-g128-asym", quantize)
