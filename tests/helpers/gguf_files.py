"""GGUF files and llama.cpp's tools for the tests."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT

LLAMA_CPP = ROOT / ".cache" / "llama-cpp"
QUANTIZE = LLAMA_CPP / "bin" / "llama-quantize"
IMATRIX = LLAMA_CPP / "bin" / "llama-imatrix"
TREE = LLAMA_CPP / "tree"
OLDER = LLAMA_CPP / "older"

needs_llama_cpp = pytest.mark.skipif(
    not (QUANTIZE.exists() and TREE.exists()), reason="llama.cpp is not built: run .ci/build-llama-cpp"
)
FULL_PRECISION = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def normal(*shape: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def write_model(
    path: Path,
    *,
    num_layers: int = 1,
    hidden: int = 256,
    ffn: int = 512,
    type_name: str = "F32",
    tied: bool = True,
    num_experts: int = 0,
    outfile_big: bool = False,
) -> Path:
    """A small Llama with random weights that llama-quantize accepts; 2 heads, 1 of them for keys and values."""
    endian = gguf.GGUFEndian.BIG if outfile_big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_block_count(num_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("no_vocab")
    writer.add_string("general.name", "a test")
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(2)
    seed = 0

    def add(name: str, *shape: int) -> None:
        nonlocal seed
        seed += 1
        weight = normal(*shape, seed=seed)
        if len(shape) == 1:
            writer.add_tensor(name, weight.numpy())
        elif type_name == "BF16":
            raw = weight.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, weight.to(FULL_PRECISION[type_name]).numpy())

    add("token_embd.weight", 64, hidden)
    if not tied:
        add("output.weight", 64, hidden)
    add("output_norm.weight", hidden)
    for i in range(num_layers):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}.weight", hidden)
        for part, rows in (
            ("attn_q", hidden),
            ("attn_k", hidden // 2),
            ("attn_v", hidden // 2),
            ("attn_output", hidden),
        ):
            add(f"blk.{i}.{part}.weight", rows, hidden)
        experts = (num_experts,) if num_experts else ()
        suffix = "_exps" if num_experts else ""
        add(f"blk.{i}.ffn_gate{suffix}.weight", *experts, ffn, hidden)
        add(f"blk.{i}.ffn_up{suffix}.weight", *experts, ffn, hidden)
        add(f"blk.{i}.ffn_down{suffix}.weight", *experts, hidden, ffn)
        if num_experts:
            add(f"blk.{i}.ffn_gate_inp.weight", num_experts, hidden)
    save(writer)
    return path


def save(writer: gguf.GGUFWriter) -> None:
    """Write all that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix(path: Path, columns: dict[str, Tensor]) -> Path:
    """An importance matrix as llama-imatrix writes it."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", ["a test"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 128)
    for name, values in columns.items():
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(values.reshape(1, -1).numpy() * 4))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 4, np.float32))
    save(writer)
    return path


def string(text: str) -> bytes:
    """A string as GGUF stores it."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def write_quantized(path: Path, type_names: list[str], metadata: dict[str, str]) -> Path:
    """A file with one tensor of 4 rows and 32 columns for each type, quantized by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_string(key, value)
    for i, type_name in enumerate(type_names):
        number = gguf.GGMLQuantizationType[type_name]
        raw = gguf.quants.quantize(normal(4, 32, seed=i).numpy(), number)
        writer.add_tensor(f"blk.{i}.ffn_up.weight", raw, raw_dtype=number)
    save(writer)
    return path
