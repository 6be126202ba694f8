"""HQQ from a guarded folder."""

from pathlib import Path

import torch
from comparison import Quantized, linear_layers, run
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import Tensor
from transformers import AutoModelForCausalLM

CONFIG = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)


def stored_codes(layer: HQQLinear) -> Tensor:
    """uint8 ``[out_features, in_features]``."""
    packing = layer.meta["packing"]
    return Quantizer.unpack[packing](layer.W_q, dtype=torch.uint8).reshape(layer.meta["shape"])


def quantize(folder: Path) -> Quantized:
    """The model and its codes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    codes = {}
    for name, layer in linear_layers(model).items():
        quantized = HQQLinear(layer, CONFIG, compute_dtype=torch.float32, device="cpu")
        model.set_submodule(name, quantized)
        codes[name] = stored_codes(quantized)
    return model, codes


if __name__ == "__main__":
    run("HQQ", "hqq:int4-g64", quantize)
