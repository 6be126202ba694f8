"""Sequential targets for `feedback`: does a layer gain from knowing what rounding did to the layers before it?

    python -m benchmarks.studies.sequential [--seeds 3] [--attack-seen] FOLDER=FORMAT

"independent" is what the package does: every layer is calibrated on the inputs of the full-precision model. "inputs"
takes the inputs that the guarded prefix gives. "targets" takes them too, and aims at the outputs of the full-precision
model: each weight first becomes the least-squares solution `W + W D^T X (X^T X + damping * mean)^-1`, X the inputs
after guarded layers and D their distance from the full-precision inputs.
"""

import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._common import parser_of
from benchmarks.studies.width import Subject, add_options, row
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.defenses import Feedback
from qcbguard_plugins.models.calibration import Calibration, calibration_tokens
from qcbguard_plugins.rounding.guard_weight import guard_weight

# The layers of a Llama's block that share an input, in the order in which they run.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
KINDS = (("independent", 0.0), ("inputs", 0.0), ("targets", 1.0), ("targets", 0.1))


@torch.no_grad()
def inputs_of(subject: Subject, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What the named layers are fed: float32 ``[num_tokens, in_features]``."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        subject.modules[name].register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
        for name in names
    ]
    for batch in tokens.split(8):
        subject.model.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([part.flatten(0, 1) for part in parts]) for name, parts in found.items()}


def aim(weight: Tensor, lattice, exact: Tensor, found: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The weight that gives the full-precision outputs on the inputs found, within its blocks' scales."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    wanted = weight + weight @ ((exact - found).T @ found) @ torch.linalg.inv(damped)
    bound = 0.999 * lattice.matrix(lattice.blocks.abs().amax(1, keepdim=True).expand_as(lattice.blocks))
    return torch.where(lattice.matrix(lattice.frozen), weight, wanted.clamp(-bound, bound))


@torch.no_grad()
def guard(subject: Subject, tokens: Tensor, kind: str, damping: float, seed: int, looks_attacked: bool) -> None:
    """Guard all layers, in the order in which they run."""
    subject.set(subject.original)
    layers = sorted({name.split("layers.")[1].split(".")[0] for name in subject.modules}, key=int)
    guarded: dict[str, Tensor] = {}
    for layer in layers:
        for group in GROUPS:
            names = [n for n in subject.modules if f"layers.{layer}." in n and n.rpartition(".")[2] in group]
            subject.set(subject.original)
            exact = inputs_of(subject, names, tokens)
            subject.set(guarded)
            found = exact if kind == "independent" else inputs_of(subject, names, tokens)
            for name in names:
                weight, grid = subject.original[name], subject.grids[name]
                hessian = found[name].T @ found[name]
                if kind == "targets":
                    weight = aim(weight, grid.lattice_of(weight), exact[name], found[name], hessian, damping)
                guarded[name] = guard_weight(
                    weight, grid, Feedback(), seed=seed, name=name, hessian=hessian, looks_attacked=looks_attacked
                ).weight
    subject.set(guarded)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model", metavar="FOLDER=FORMAT", help="nf4, fp4 or int8; a Llama")
    add_options(parser)
    parser.add_argument("--attack-seen", action="store_true", help="take the full width")
    args = parser.parse_args()
    quieten_libraries()
    folder, _, quant_format = args.model.partition("=")
    subject = Subject(Path(folder), quant_format, args)
    tokens = calibration_tokens(Calibration(), subject.model.config, subject.tokenizer)
    table = Table("layers", "KL", "perplexity", "keyword", "error back", "seconds", box=None, title=args.model)
    for kind, damping in KINDS:
        found, seconds = [], []
        for seed in range(args.seeds):
            start = time.perf_counter()
            guard(subject, tokens, kind, damping, seed, args.attack_seen)
            seconds.append(time.perf_counter() - start)
            found.append(subject.figures())
        label = f"{kind}, damping {damping:g}" if kind == "targets" else kind
        table.add_row(*row(label, found), f"{statistics.mean(seconds):.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
