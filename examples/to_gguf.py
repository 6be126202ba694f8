"""An example model as a GGUF file in F32, to try the guard for llama.cpp with.

llama.cpp's own converter knows the tokenizers of released models and refuses those of the example models. Nothing else
is special about the file: names, shapes and the order of rows are those that the converter writes for a Llama.

    python examples/to_gguf.py examples/models/attacked attacked-f32.gguf
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name.startswith("model.layers."):
        _, _, block, rest = name.split(".", 3)
        return f"blk.{block}.{NAMES[rest]}"
    return NAMES[name]


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order in which llama.cpp rotates them."""
    half = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return half.swapaxes(1, 2).reshape(weight.shape)


def convert(model_dir: Path, out: Path) -> None:
    """Write the weights and the sizes of a Llama; the file has no vocabulary."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, stored in load_file(model_dir / "model.safetensors").items():
        weight = stored.astype(np.float32)
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = interleaved(weight, key_heads)
        writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Convert."""
    parser = argparse.ArgumentParser(description="Write an example model as a GGUF file in F32.")
    parser.add_argument("model", type=Path, help="folder of an example model")
    parser.add_argument("out", type=Path, help="file to make; it must not exist")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} has no config.json")
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")
    convert(arguments.model, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
