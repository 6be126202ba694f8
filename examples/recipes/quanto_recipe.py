"""Optimum Quanto from a guarded folder: guard, quantize with Quanto, count the codes that are stored as planned."""

import sys
import tempfile
from pathlib import Path

import torch
from optimum.quanto import freeze, qint8, quantize
from transformers import AutoModelForCausalLM

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.grids import get_grid

FORMAT = "quanto:int8"


def share_as_planned(guarded: Path) -> float:
    """Quantize the model with Quanto and compare."""
    model = AutoModelForCausalLM.from_pretrained(guarded)
    grid = get_grid(FORMAT)
    planned = {
        name: grid.quantize(module.weight.data)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    middle = grid.num_levels // 2
    stored = {name: model.get_submodule(name).weight._data.to(torch.int16) + middle for name in planned}
    equal = sum(int((stored[name] == codes).sum()) for name, codes in planned.items())
    return equal / sum(codes.numel() for codes in planned.values())


def main(model: str, method: str = "feedback") -> int:
    """Guard, quantize, compare; 0 if at least 99 % of the codes are those planned."""
    with tempfile.TemporaryDirectory() as folder:
        guard_checkpoint(model, Path(folder) / "guarded", [FORMAT], method)
        share = share_as_planned(Path(folder) / "guarded")
    print(f"Quanto stores {share:.3%} of the codes as planned")
    return 0 if share >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
