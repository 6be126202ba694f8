"""Memory and time of QuantGuard's variables: all weights, or those within a band of the boundary.

    python -m benchmarks.studies.learned_memory

Each row is a process of its own: two steps on a randomly initialised Llama of 30 M parameters, one sequence of 64
tokens a step. "grows by" is the peak beyond the loaded model, activations and one step's weights included.
"""

import json
import resource

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._common import parser_of, run_module, seconds_of
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.defenses import ModelWeight, QuantGuard
from qcbguard_plugins.defenses.soft_rounding import SoftRounding

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8}
RUNS = [{}, {"band": 0.25}, {"band": 0.1}, {"band": 0.02}, {"band": 0.02, "gradient_checkpointing": True}]


def measure(parameters: dict) -> dict:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **SHAPE)).eval()
    modules = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    grid = get_grid("nf4")
    method = QuantGuard(steps=2, batch_size=1, **parameters)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    targets = (ModelWeight(name, (m,), False, grid.lattice_of(m.weight.data)) for name, m in modules.items())
    elapsed_s = seconds_of(lambda: method.learn(model, targets, torch.randint(256, (2, 64)), seed=0))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    num_variables = sum(
        SoftRounding(grid.lattice_of(module.weight.data), band=method.band).alpha.numel() for module in modules.values()
    )
    return {
        "variables": num_variables,
        "weights": sum(module.weight.numel() for module in modules.values()),
        "grows_mib": grown / 1024,
        "seconds": elapsed_s / method.steps,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--one", type=json.loads, help="measure these parameters in this process")
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one)))
        return
    table = Table("parameters", "variables", "of weights", "grows by", "seconds a step", box=None)
    for parameters in RUNS:
        found = run_module(__spec__.name, "--one", json.dumps(parameters))
        label = ", ".join(f"{name} {value}" for name, value in parameters.items()) or "all weights"
        share = found["variables"] / found["weights"]
        grows, seconds = f"{found['grows_mib']:.0f} MiB", f"{found['seconds']:.1f}"
        table.add_row(label, f"{found['variables']:,}", f"{share:.0%}", grows, seconds)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
