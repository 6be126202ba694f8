"""Optimum Quanto from a guarded folder."""

from pathlib import Path

import torch
from comparison import Quantized, linear_layers, run
from optimum import quanto
from transformers import AutoModelForCausalLM


def quantize(folder: Path) -> Quantized:
    """The model and its codes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    # Quanto counts from -127.
    return model, {name: layer.weight._data.to(torch.int16) + 127 for name, layer in linear_layers(model).items()}


if __name__ == "__main__":
    run("Quanto", "quanto:int8", quantize)
