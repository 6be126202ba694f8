"""What a guarded checkpoint costs on many nodes: a model of time and traffic from measured parameters.

    python -m benchmarks.speed.checkpoint_speed --gigabytes 2 --json checkpoint_speed.json
    python -m benchmarks.speed.scaling checkpoint_speed.json

The first command measures one and two processes; this one takes the model's parameters from one process, says what the
model predicts for two, and what it says for nodes that nobody here has. docs/scaling.md explains it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks._common import parser_of
from qcbguard_plugins._util.distributed import ProcessGroup

# Matrices of one block of Llama models, and how many blocks there are.
LLAMA = {
    "8B": (4096, 14336, 1024, 32),
    "70B": (8192, 28672, 1024, 80),
    "405B": (16384, 53248, 1024, 126),
}
_BYTES_PER_WEIGHT = 2
_BATCHES, _BATCH_TOKENS = 8, 8 * 256


@dataclass(frozen=True)
class Rates:
    """Parameters of the model.

    Attributes:
        start_s: Seconds before one process reads its first weight: imports and the plan.
        start_of_many_s: The same where a launcher starts several.
        guarded: Bytes a second that one process guards, verifies, hashes and writes.
    """

    start_s: float
    start_of_many_s: float
    guarded: float


def block_shapes(name: str) -> list[tuple[int, int]]:
    """Shapes of all matrices of the blocks of a model."""
    hidden, intermediate, key_value, num_blocks = LLAMA[name]
    block = [(hidden, hidden)] * 2 + [(key_value, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return block * num_blocks


def seconds(sizes: list[int], num_processes: int, rates: Rates) -> float:
    """Time of a data-free guard: the process with the largest share ends last."""
    shares = [sum(ProcessGroup(rank, num_processes).share(sizes, lambda size: size)) for rank in range(num_processes)]
    start = rates.start_s if num_processes == 1 else rates.start_of_many_s
    return start + max(shares) / rates.guarded


def hessian_bytes(name: str) -> float:
    """Bytes of all Hessians of a model: one for each input that layers share, float32."""
    hidden, intermediate, _, num_blocks = LLAMA[name]
    return 4.0 * num_blocks * (3 * hidden**2 + intermediate**2)


def main() -> None:
    parser = parser_of(__doc__, whole=True)
    parser.add_argument("measured", type=Path, help="what benchmarks.speed.checkpoint_speed wrote")
    parser.add_argument("--processes-per-node", type=int, default=8)
    arguments = parser.parse_args()
    measured = json.loads(arguments.measured.read_text())
    jobs = {name: job["elapsed_s"] for name, job in measured["jobs"].items()}
    one, two = jobs["one process, one thread"], jobs["two processes, one thread each"]
    hidden, intermediate = 4096, 11008
    block = [hidden * hidden] * 4 + [hidden * intermediate] * 3
    num_blocks = max(1, round(measured["gigabytes"] * 1e9 / (sum(block) * _BYTES_PER_WEIGHT)))
    sizes = [_BYTES_PER_WEIGHT * size for size in block * num_blocks]
    start, start_of_two = jobs["start of one process"], jobs["start of two processes"]
    rates = Rates(start, start_of_two, sum(sizes) / (one - start))
    print(f"start {start:.2f} s, of two {start_of_two:.2f} s; {rates.guarded / 1e6:.0f} MB/s a process")
    print(f"({measured['machine']})\n")
    print("| processes | measured s | model s |\n|---|---|---|")
    print(f"| 1 | {one:.1f} | {seconds(sizes, 1, rates):.1f} |")
    print(f"| 2 | {two:.1f} | {seconds(sizes, 2, rates):.1f} |\n")
    print("| model | nodes | data-free | read and written by a node | Hessians sent to a node, calibrated |")
    print("|---|---|---|---|---|")
    for name in LLAMA:
        shapes = [rows * columns * _BYTES_PER_WEIGHT for rows, columns in block_shapes(name)]
        for nodes in (1, 8, 64):
            processes = nodes * arguments.processes_per_node
            traffic = 5 * sum(shapes) / nodes
            sent = _BATCHES * hessian_bytes(name) if nodes > 1 else 0
            print(
                f"| Llama {name} | {nodes} | {seconds(shapes, processes, rates) / 60:.1f} min | {traffic / 1e9:.1f} GB "
                f"| {sent / 1e9:.0f} GB |"
            )


if __name__ == "__main__":
    main()
