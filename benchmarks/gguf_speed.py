"""The guard's own time beside that of llama-quantize, on one large random model file.

    python benchmarks/gguf_speed.py --llama-quantize BINARY

Both run on the same number of threads; each time is one run, of the data-free default.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import torch

from qcbguard_plugins.backends.gguf.file import guard_gguf
from qcbguard_plugins.backends.gguf.library import load_library
from qcbguard_plugins.backends.gguf.options import GgufOptions

HIDDEN, FFN, NUM_LAYERS = 2048, 4096, 2
RECIPES = ("Q4_0", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")


def write_model(path: Path) -> int:
    """A Llama with random weights; returns the number of weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(16)
    writer.add_head_count_kv(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // 16)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("no_vocab")
    generator = torch.Generator().manual_seed(0)
    num_weights = 0
    shapes = {"token_embd": (64, HIDDEN)}
    for i in range(NUM_LAYERS):
        shapes |= {f"blk.{i}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.ffn_{name}": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down"] = (HIDDEN, FFN)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=generator) * 0.02).half().numpy())
        num_weights += shape[0] * shape[1]
    for name in ("output_norm", *(f"blk.{i}.{part}_norm" for i in range(NUM_LAYERS) for part in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return num_weights


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The guard's time beside llama-quantize's.")
    parser.add_argument("--llama-quantize", type=Path, required=True)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    load_library()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "model.gguf"
        num_weights = write_model(source)
        print(f"{num_weights / 1e6:.0f} M weights, {threads} threads\n")
        print("| recipe | llama-quantize s | guard s | ratio | codes landed |\n|---|---|---|---|---|")
        for recipe in RECIPES:
            target, guarded = Path(name) / "quantized.gguf", Path(name) / "guarded.gguf"
            start = time.perf_counter()
            command = [str(args.llama_quantize), str(source), str(target), recipe, str(threads)]
            subprocess.run(command, check=True, capture_output=True)
            stock = time.perf_counter() - start
            start = time.perf_counter()
            report = guard_gguf(source, guarded, recipe, options=GgufOptions(quantize_path=args.llama_quantize))
            ours = time.perf_counter() - start
            print(
                f"| {recipe} | {stock:.2f} | {ours:.2f} | {ours / stock:.2f} | {report.share_landed:.3%} |", flush=True
            )
            guarded.unlink()


if __name__ == "__main__":
    main()
