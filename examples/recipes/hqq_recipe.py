"""HQQ from a guarded folder: guard, quantize with HQQ, count the codes that are stored as planned."""

import sys
import tempfile
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from transformers import AutoModelForCausalLM

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.grids import get_grid

FORMAT, GROUP_SIZE = "hqq:int4-g64", 64


def stored_codes(layer: HQQLinear) -> torch.Tensor:
    """uint8 ``[out_features, in_features]``."""
    packing = layer.meta["packing"]
    return Quantizer.unpack[packing](layer.W_q, dtype=torch.uint8).reshape(layer.meta["shape"])


def share_as_planned(guarded: Path) -> float:
    """Quantize every layer of the blocks with HQQ and compare."""
    model = AutoModelForCausalLM.from_pretrained(guarded, dtype=torch.float32)
    grid, equal, total = get_grid(FORMAT), 0, 0
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP_SIZE, axis=1)
    for layer in list(model.model.layers.modules()):
        if isinstance(layer, torch.nn.Linear):
            planned = grid.quantize(layer.weight.data)
            quantized = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            equal += int((stored_codes(quantized) == planned).sum())
            total += planned.numel()
    return equal / total


def main(model: str, method: str = "feedback") -> int:
    """Guard, quantize, compare; 0 if at least 99 % of the codes are those planned."""
    with tempfile.TemporaryDirectory() as folder:
        guard_checkpoint(model, Path(folder) / "guarded", [FORMAT], method)
        share = share_as_planned(Path(folder) / "guarded")
    print(f"HQQ stores {share:.3%} of the codes as planned")
    return 0 if share >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
