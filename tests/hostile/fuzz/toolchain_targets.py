"""What other toolchains wrote, as ``verify`` reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.hostile.fuzz import mutation
from tests.hostile.fuzz.registry import Prepared, target


def _gptq(folder: Path, name: str) -> Prepared:
    """A folder that GPTQ wrote, and the guarded folder that it was made from; one of its files is the input."""
    import torch
    from safetensors.torch import save_file

    from qcbguard_plugins import Guard, Stochastic, guard_checkpoint
    from qcbguard_plugins.checkpoint import open_checkpoint
    from qcbguard_plugins.checkpoint.manifest import read_manifest
    from qcbguard_plugins.pipeline.verify import verify
    from tests.hostile.fuzz.folder_targets import tiny_llama

    plan, packed = folder / "plan", folder / "packed"
    guard_checkpoint(tiny_llama(folder / "model"), plan, ["gptq-w4g32"], Guard(Stochastic(), seed=0))
    shutil.copytree(plan, packed)
    tensors = {}
    for record in read_manifest(plan).tensors:
        rows, columns = record.shape
        layer = record.key.removesuffix(".weight")
        tensors |= {
            f"{layer}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
            f"{layer}.qzeros": torch.zeros(columns // 32, rows // 8, dtype=torch.int32),
            f"{layer}.scales": torch.ones(columns // 32, rows, dtype=torch.float16),
            f"{layer}.g_idx": torch.arange(columns, dtype=torch.int32) // 32,
        }
    save_file(tensors, packed / "model.safetensors")
    config = open_checkpoint(plan).config
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    path = packed / name
    return Prepared(path, [path.read_bytes()], lambda path: verify(path.parent, plan=plan))


@target("gptq", "the packed codes of a GPTQ folder", mutation.safetensors_header)
def _gptq_weights(folder: Path) -> Prepared:
    return _gptq(folder, "model.safetensors")


@target("gptq-config", "the config.json of a GPTQ folder", mutation.json_document)
def _gptq_config(folder: Path) -> Prepared:
    return _gptq(folder, "config.json")
