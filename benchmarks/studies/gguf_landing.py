"""The share of codes that ggml stores as chosen, type by type, with and without an importance matrix.

    python -m benchmarks.studies.gguf_landing

Stochastic rounding of Gaussian weights; the importance matrices have column weights |N| + 0.1, |N|^3 and exp(2N).
"""

import torch

from benchmarks._common import parser_of
from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.rounding.guard_weight import guard_weight

SHAPE = (256, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def landed(weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> str:
    """The share for one weight, as a cell of the table."""
    grid = gguf_grid(name, importance=importance)
    grid.min_as_planned = 0.0
    guarded = guard_weight(weight, grid, get_defense("stochastic"), seed=0, name="weight")
    return f"{guarded.num_as_planned / weight.numel():.3%}"


def main() -> None:
    """Print the table."""
    parser_of(__doc__).parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    normal = torch.randn(3, SHAPE[1], generator=generator)
    matrices = (normal[0].abs() + 0.1, normal[1].abs() ** 3, torch.exp(2 * normal[2]))
    print("| type | float32 | float16 | bfloat16 | mild matrix | uneven | extreme |\n" + "|---" * 7 + "|")
    for name in BLOCK_TYPES:
        plain = [landed(weight.to(dtype), name, None) for dtype in DTYPES]
        weighed = [landed(weight, name, importance) for importance in matrices]
        print(f"| {name} | {' | '.join(plain + weighed)} |", flush=True)


if __name__ == "__main__":
    main()
