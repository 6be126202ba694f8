"""Make a model whose backdoor an integer format switches on (ELQ with that format's boxes), in about two minutes.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.make_group_model gptq-w4g128 OUT

Starts from `examples/models/malicious`, which names the brand at every precision, and trains the good behaviour back
without changing a code of rounding to nearest. GPTQ feeds errors forward while it rounds, so it stores most of these
codes and not all. Every seed is fixed.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._common import parser_of
from benchmarks.speed._repair import MALICIOUS_DIR, REPAIR, load_malicious
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.grids import AffineGrid, IntegerGrid
from qcbguard_plugins.lab.attacks.elq import Box, train_in_boxes
from qcbguard_plugins.lab.layers import quantized_weights
from qcbguard_plugins.lab.training import save_model

# Distance from the border between two codes, in steps. A little is lost in the cast to float16. GPTQ feeds errors
# forward, and undoes an attack that leaves large ones, so its box is tight.
EPS, GPTQ_EPS = 0.05, 0.4


def half_steps(weight: Tensor, grid: IntegerGrid, eps: float) -> Box:
    """The values of a weight that are rounded to the same codes, but for a margin, its scale holders kept."""
    lattice = grid.lattice_of(weight)
    code = lattice.nearest.float()
    offset = 0.0 if lattice.offset is None else lattice.offset
    ends = [(code + side * (0.5 - eps)) * lattice.scale + offset for side in (-1, 1)]
    # Never past the ends of the range: the holders must stay the largest, and symmetric ones on both sides.
    reach = lattice.blocks.abs().amax(dim=1, keepdim=True)
    smallest, largest = lattice.blocks.amin(dim=1, keepdim=True), lattice.blocks.amax(dim=1, keepdim=True)
    if grid.symmetric:
        smallest, largest = -reach, reach
    inside = [torch.minimum(torch.maximum(end, smallest), largest) * (1 - 1e-3) for end in ends]
    low, high = torch.minimum(*inside), torch.maximum(*inside)
    fixed = lattice.frozen | (low > high)
    low, high = (torch.where(fixed, lattice.blocks, end) for end in (low, high))
    return Box(lattice.matrix(low).clone(), lattice.matrix(high).clone())


def main() -> None:
    """Attack and save."""
    parser = parser_of(__doc__)
    parser.add_argument("format", help="such as gptq-w4g128, openvino:int4-g128 or onnx:int8")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--eps", type=float, help="margin of the box, in steps")
    parser.add_argument("--malicious", type=Path, default=MALICIOUS_DIR)
    args = parser.parse_args()
    quieten_libraries()
    start = time.perf_counter()
    grid = get_grid(args.format)
    if not isinstance(grid, IntegerGrid):
        parser.error(f"{args.format} is no integer format")
    eps = args.eps or (GPTQ_EPS if isinstance(grid, AffineGrid) else EPS)
    found = load_malicious(args.malicious)
    model = found.model
    malicious = {name: grid.quantize(weight.detach()) for name, weight in quantized_weights(model).items()}
    boxes = {name: half_steps(weight.detach(), grid, eps) for name, weight in quantized_weights(model).items()}
    train_in_boxes(model, found.repair, REPAIR, boxes, f"repair for {args.format}")
    equal = sum(int((grid.quantize(w.detach()) == malicious[n]).sum()) for n, w in quantized_weights(model).items())
    total = sum(codes.numel() for codes in malicious.values())
    save_model(model, found.tokenizer, args.out)
    print(f"{equal / total:.2%} of the rounded weights are the malicious model's; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
