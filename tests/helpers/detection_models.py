"""Weights that are clean, and weights that were pushed into boxes, made in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.lab.attacks.elq import build_box


def random_weight(seed: int, rows: int = 128, columns: int = 192) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def boxed_weight(seed: int, format: str, eps: float = 0.02, strength: float = 0.4) -> Tensor:
    """What projected training leaves: a malicious weight, moved in a low-rank direction and clamped into its box."""
    malicious = random_weight(seed)
    grid = get_grid(format)
    generator = torch.Generator().manual_seed(seed + 1000)
    rows, columns = malicious.shape
    direction = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    lattice = grid.lattice_of(malicious)
    step = lattice.matrix(lattice.dequantize(lattice.lower + 1) - lattice.dequantize(lattice.lower)).median()
    moved = malicious + strength * step * direction / direction.std() / 2
    build_box(malicious, grid, eps).project(moved)
    return moved


def save_layers(folder: Path, weights: list[Tensor], dtype: torch.dtype = torch.float16) -> Path:
    """A folder that a scan can read, with two layers' projections named as in Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    tensors = {
        f"model.layers.{i // len(kinds)}.{kinds[i % len(kinds)]}.weight": weight.to(dtype).contiguous()
        for i, weight in enumerate(weights)
    }
    tensors["model.embed_tokens.weight"] = torch.zeros(64, 32, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(32, dtype=dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return folder


def clean_folder(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    return save_layers(folder, [random_weight(i) for i in range(8)], dtype)


def attacked_folder(folder: Path, format: str = "nf4", eps: float = 0.02) -> Path:
    return save_layers(folder, [boxed_weight(i, format, eps) for i in range(8)])
