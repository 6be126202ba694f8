"""AWQ from a guarded folder: guard, let llm-compressor's AWQ look for scales, count the codes stored as planned.

AWQ tries scales for the input columns, none at all among them, and keeps those that lower the error of the layer's
output. A guarded weight lies on the grid of asymmetric groups and has no error without a scale, so AWQ leaves it alone.
"""

import sys

import torch
from datasets import Dataset
from llm_compressor_recipe import guard_and_compare
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier

from qcbguard_plugins.calibration import builtin_texts

NUM_SEQUENCES, SEQUENCE_LENGTH = 32, 64


def main(model: str, method: str = "feedback") -> int:
    """Guard, quantize, compare; 0 if at least 99 % of the codes are those planned."""
    if not torch.accelerator.is_available():
        # AWQ pins its calibration inputs for copies to an accelerator; torch refuses that where there is none.
        torch.Tensor.pin_memory = lambda self: self
    return guard_and_compare(
        model,
        method,
        "compressed-tensors:int4-g128-asym",
        recipe=[
            AWQModifier(),
            QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=["lm_head"]),
        ],
        dataset=Dataset.from_dict({"text": list(builtin_texts())[:NUM_SEQUENCES]}),
        num_calibration_samples=NUM_SEQUENCES,
        max_seq_length=SEQUENCE_LENGTH,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
