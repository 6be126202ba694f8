"""Guarding one weight against quantizing it with bitsandbytes, both in this run.

    python -m benchmarks.speed.data_free_speed

Prints the median time of each and their ratio, for every format and dtype; on a GPU with --device cuda.
"""

import statistics
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._common import add_json, parser_of, seconds_of, write_json
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import get_defense
from qcbguard_plugins.rounding.guard_weight import guard_weight

FORMATS = ("nf4", "fp4", "int8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize(weight: torch.Tensor, name: str) -> Callable[[], object]:
    if name == "int8":
        return lambda: bnb.int8_vectorwise_quant(weight.half())
    return lambda: bnb.quantize_4bit(weight, quant_type=name, blocksize=64)


def compare(
    name: str, dtype: torch.dtype, size: int, method: str, repeats: int, device: str = "cpu"
) -> tuple[float, float]:
    weight = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype).to(device)
    grid, defense = get_grid(name), get_defense(method)
    stock = quantize(weight, name)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        times[0].append(seconds_of(lambda: guard_weight(weight, grid, defense, seed=0, name="w")))
        times[1].append(seconds_of(stock))
    # The first pair warms up caches and allocators.
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--method", default="stochastic")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json(parser)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("skipped: no CUDA device")
    rows = []
    table = Table("format", "dtype", "guard s", "bitsandbytes s", "ratio", box=None)
    for name in FORMATS:
        for dtype in DTYPES:
            guard, stock = compare(name, dtype, args.size, args.method, args.repeats, args.device)
            rows.append({"format": name, "dtype": str(dtype)[6:], "guard_s": guard, "stock_s": stock})
            table.add_row(name, str(dtype)[6:], f"{guard:.3f}", f"{stock:.3f}", f"{guard / stock:.2f}")
    console = Console()
    console.print(
        f"{args.method}, {args.size}x{args.size}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    console.print(table)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    write_json({"method": args.method, "size": args.size, "where": where, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
