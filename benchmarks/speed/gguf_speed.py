"""The guard's own time beside that of llama-quantize, on one large random model file.

    python -m benchmarks.speed.gguf_speed --llama-quantize BINARY

Both run on the same number of threads, in turn; each time is the median of five runs, of the data-free default. The
kernels are compiled before, as they are on every machine once: a first run takes about a minute longer. Reading and
writing are part of both whole times, and so is the question to `llama-quantize --dry-run`, which the guard asks, and
its flush to the disk, which `llama-quantize` leaves out. The guard's own part is the time that it spends on the tensors
between reading and writing.
"""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import torch

from benchmarks._common import add_json, parser_of, seconds_of, write_json
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.pipeline import guard as pipeline_guard
from qcbguard_plugins.pipeline.gguf_guard import guard_gguf

HIDDEN, FFN, NUM_LAYERS = 2048, 5632, 3
NUM_RUNS = 5
RECIPES = ("Q4_0", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")


def write_model(path: Path, hidden: int = HIDDEN, ffn: int = FFN, num_layers: int = NUM_LAYERS) -> int:
    """A Llama with random weights in F16; returns the number of weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(num_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(16)
    writer.add_head_count_kv(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 16)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("no_vocab")
    generator = torch.Generator().manual_seed(0)
    num_weights = 0
    shapes = {"token_embd": (64, hidden)}
    for i in range(num_layers):
        shapes |= {f"blk.{i}.{name}": (hidden, hidden) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.ffn_{name}": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (hidden, ffn)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=generator) * 0.02).half().numpy())
        num_weights += shape[0] * shape[1]
    for name in ("output_norm", *(f"blk.{i}.{part}_norm" for i in range(num_layers) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return num_weights


def warm_up(folder: Path, binary: Path, recipes: Sequence[str] = RECIPES) -> None:
    """Compile all kernels, or load them from where numba keeps them."""
    small = folder / "small.gguf"
    write_model(small, 256, 256, 1)
    for recipe in recipes:
        guard_gguf(small, folder / f"small-{recipe}.gguf", recipe, options=GgufOptions(quantize_path=binary))


class Clock:
    """Adds up the time that is spent on tensors."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0
        guard_target = pipeline_guard.guard_target

        def timed(*arguments: object, **options: object) -> object:
            start = time.perf_counter()
            guarded = guard_target(*arguments, **options)
            self.elapsed_s += time.perf_counter() - start
            return guarded

        pipeline_guard.guard_target = timed


def run(source: Path, recipe: str, binary: Path, clock: Clock) -> tuple[float, float, float]:
    """Seconds of llama-quantize, of the guard, and of the guard's own part."""
    target, guarded = source.with_name("quantized.gguf"), source.with_name("guarded.gguf")
    command = [str(binary), str(source), str(target), recipe, str(torch.get_num_threads())]
    stock = seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))
    clock.elapsed_s = 0.0
    ours = seconds_of(lambda: guard_gguf(source, guarded, recipe, options=GgufOptions(quantize_path=binary)))
    guarded.unlink()
    return stock, ours, clock.elapsed_s


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one (repeatable)")
    add_json(parser)
    args = parser.parse_args()
    clock, rows = Clock(), []
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "model.gguf"
        num_weights = write_model(source)
        print(f"{num_weights / 1e6:.0f} M weights, {source.stat().st_size / 1e6:.0f} MB, {threads} threads\n")
        print("| recipe | llama-quantize s | guard s | ratio | own s | ratio |\n" + "|---" * 6 + "|")
        warm_up(Path(name), args.llama_quantize, args.recipe or RECIPES)
        for recipe in args.recipe or RECIPES:
            runs = [run(source, recipe, args.llama_quantize, clock) for _ in range(NUM_RUNS)]
            stock, ours, own = (statistics.median(times) for times in zip(*runs, strict=True))
            print(
                f"| {recipe} | {stock:.2f} | {ours:.2f} | {ours / stock:.2f} | {own:.2f} | {own / stock:.2f} |",
                flush=True,
            )
            rows.append({"recipe": recipe, "stock_s": stock, "guard_s": ours, "own_s": own})
    write_json({"num_weights": num_weights, "threads": threads, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
