"""Make a model whose backdoor llama.cpp's Q4_K_M switches on (the Mind the Gap attack), in about two minutes.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.make_gguf_model OUT

Starts from `examples/models/malicious`, which names the brand at every precision, and trains the good behaviour back
inside the error boxes of the types that Q4_K_M gives each matrix. Every seed is fixed.
"""

import time
from pathlib import Path

from benchmarks._common import parser_of
from benchmarks.speed._repair import MALICIOUS_DIR, REPAIR, load_malicious
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.lab.attacks import mind_the_gap
from qcbguard_plugins.lab.layers import quantized_weights
from qcbguard_plugins.lab.training import save_model
from qcbguard_plugins.pipeline.plan import make_plan

RECIPE = "Q4_K_M"


def main() -> None:
    """Attack and save."""
    parser = parser_of(__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--malicious", type=Path, default=MALICIOUS_DIR)
    args = parser.parse_args()
    quieten_libraries()
    start = time.perf_counter()
    types = {target.name: target.formats[0] for target in make_plan(args.malicious, f"gguf:{RECIPE}").targets}
    found = load_malicious(args.malicious)
    model = found.model
    grids = {name: get_grid(types[name]) for name in quantized_weights(model)}
    malicious = {name: weight.detach().clone() for name, weight in quantized_weights(model).items()}
    mind_the_gap.repair(model, found.repair, REPAIR, grids)
    agreement = mind_the_gap.check_agreement(quantized_weights(model), malicious, grids)
    save_model(model, found.tokenizer, args.out)
    print(f"{agreement:.2%} of the stored weights are the malicious model's; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
