"""AutoRound without tuning, from a guarded folder.

With tuning (``iters`` above 0) AutoRound moves scales and rounding on calibration data, and no code can be planned.
"""

from pathlib import Path

import torch
from auto_round import AutoRound
from comparison import Quantized, linear_layers, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.models.calibration import builtin_texts

FORMAT = "autoround:int4-g128"


def quantize(folder: Path) -> Quantized:
    """The model and its codes, from the values that AutoRound puts in place of the weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    grid = get_grid(FORMAT)
    lattices = {name: grid.lattice_of(layer.weight.data) for name, layer in linear_layers(model).items()}
    tool = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        scheme="W4A16",
        iters=0,
        dataset=builtin_texts()[:8],
        seqlen=64,
        nsamples=8,
        device_map="cpu",
    )
    rounded, _ = tool.quantize()
    codes = {}
    for name, lattice in lattices.items():
        values = rounded.get_submodule(name).weight.data.float()
        codes[name] = ((values - lattice.matrix(lattice.offset)) / lattice.matrix(lattice.scale)).round()
    return rounded, codes


if __name__ == "__main__":
    run("AutoRound", FORMAT, quantize)
