"""AutoRound without tuning, from a guarded folder: guard, quantize, count the codes that are stored as planned.

With tuning (``iters`` above 0) AutoRound moves scales and rounding on calibration data, and no code can be planned.
"""

import sys
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.calibration import builtin_texts
from qcbguard_plugins.grids import get_grid

FORMAT, GROUP_SIZE = "autoround:int4-g128", 128


def share_as_planned(guarded: Path) -> float:
    """Let AutoRound round the model, and compare the values that it puts in place of the weights."""
    model = AutoModelForCausalLM.from_pretrained(guarded, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(guarded)
    grid = get_grid(FORMAT)
    lattices = {
        name: grid.lattice_of(module.weight.data)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    tool = AutoRound(
        model, tokenizer, scheme="W4A16", iters=0, group_size=GROUP_SIZE, dataset=builtin_texts()[:8], seqlen=64,
        nsamples=8, device_map="cpu",
    )  # fmt: skip
    rounded, _ = tool.quantize()
    equal = total = 0
    for name, lattice in lattices.items():
        stored = rounded.get_submodule(name).weight.data.float()
        planned = lattice.matrix(lattice.dequantize(lattice.nearest))
        equal += int(((stored - planned).abs() < lattice.matrix(lattice.scale.abs()) / 2).sum())
        total += planned.numel()
    return equal / total


def main(model: str, method: str = "feedback") -> int:
    """Guard, quantize, compare; 0 if at least 99 % of the codes are those planned."""
    with tempfile.TemporaryDirectory() as folder:
        guard_checkpoint(model, Path(folder) / "guarded", [FORMAT], method)
        share = share_as_planned(Path(folder) / "guarded")
    print(f"AutoRound stores {share:.3%} of the codes as planned")
    return 0 if share >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
