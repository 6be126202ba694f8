"""What a quantizer of another toolchain takes of a checkpoint, on tiny mixtures of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GraniteMoeConfig, MixtralConfig, Qwen3MoeConfig

from qcbguard_plugins.checkpoint import open_checkpoint
from qcbguard_plugins.checkpoint.uncovered import describe_uncovered
from qcbguard_plugins.models.coverage import uncovered_tensors
from qcbguard_plugins.models.skeleton import build_skeleton, load_config

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# The configuration, the number of tensors that hold experts in the checkpoint, and the weights in them.
MIXTURES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "mixtral": (lambda: MixtralConfig(**SMALL, num_local_experts=4), 2 * 4 * 3, 2 * 4 * 3 * 96 * 64),
    "qwen3-moe": (
        lambda: Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
        2 * 4 * 3,
        2 * 4 * 3 * 32 * 64,
    ),
    "gpt-oss": (
        lambda: GptOssConfig(**SMALL, num_local_experts=4, head_dim=16, layer_types=["full_attention"] * 2),
        2 * 2,
        2 * 4 * 3 * 96 * 64,
    ),
    "granite-moe": (lambda: GraniteMoeConfig(**SMALL, num_local_experts=4), 2 * 2, 2 * 4 * 3 * 96 * 64),
}


def linear_keys(folder: Path) -> set[str]:
    """Names in the checkpoint of the linear layers, as a plan lists them."""
    return {
        key
        for key in open_checkpoint(folder).tensors
        if "_proj.weight" in key and not {"experts", "mtp"} & set(key.split("."))
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_named_and_counted(name: str, tmp_path: Path) -> None:
    make, num_tensors, num_weights = MIXTURES[name]
    model = AutoModelForCausalLM.from_config(make()).bfloat16()
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    skeleton = build_skeleton(load_config(tmp_path / "model"))
    found = uncovered_tensors(skeleton, checkpoint, linear_keys(tmp_path / "model"))
    assert len(found) == num_tensors and all("expert" in t.key or "block_sparse_moe" in t.key for t in found)
    assert sum(tensor.num_weights for tensor in found) == num_weights
    assert sum(tensor.num_bytes for tensor in found) == 2 * num_weights
    (line,) = describe_uncovered(found)
    assert line.startswith(f"{num_tensors} tensors ({num_weights:,} weights, ") and "vLLM" in line


@pytest.mark.parametrize("shape", ["llama-fp32", "llama-tied", "gpt2", "llama-sharded"])
def test_a_dense_model_is_covered(shape: str, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder(shape)
    skeleton = build_skeleton(load_config(folder))
    assert uncovered_tensors(skeleton, open_checkpoint(folder), linear_keys(folder)) == ()
    assert describe_uncovered(()) == []


def add_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: tensor}, path, metadata={"format": "pt"})


def test_a_matrix_that_no_module_reads(folder: Path) -> None:
    """As the layers for speculative decoding that many checkpoints carry."""
    add_tensor(folder, "mtp.layers.0.mlp.up_proj.weight", torch.zeros(160, 64))
    add_tensor(folder, "model.rotary_emb.inv_freq", torch.zeros(4096))
    skeleton = build_skeleton(load_config(folder))
    (found,) = uncovered_tensors(skeleton, open_checkpoint(folder), linear_keys(folder))
    assert found.key == "mtp.layers.0.mlp.up_proj.weight" and found.num_weights == 160 * 64
    assert found.reason.startswith("no module of LlamaForCausalLM reads them")


def test_a_matrix_for_a_class_of_the_model_s_own(folder: Path) -> None:
    add_tensor(folder, "side.table", torch.zeros(64, 64))
    skeleton = build_skeleton(load_config(folder))
    assert uncovered_tensors(skeleton, open_checkpoint(folder), linear_keys(folder)) == ()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "c.Config", "AutoModelForCausalLM": "modeling.Side"}
    (folder / "config.json").write_text(json.dumps(config))
    (found,) = uncovered_tensors(skeleton, open_checkpoint(folder), linear_keys(folder))
    assert found.key == "side.table" and "modeling.Side of auto_map, whose code is not run" in found.reason
