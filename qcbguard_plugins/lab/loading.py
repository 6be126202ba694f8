"""Load a folder as its user would: in full precision, through stock bitsandbytes, or as llama.cpp would store it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcbguard_plugins.lab.metrics import use_exact_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The model as it was downloaded.
FULL_PRECISION = "fp"


def load_as(model_dir: Path, format: str) -> PreTrainedModel:
    """Load a full-precision folder in one format, to be computed in float32.

    Args:
        model_dir: Folder of a full-precision checkpoint.
        format: ``fp``; ``nf4``, ``fp4``, ``int8`` or one with a block size, through the stock bitsandbytes load; or
            ``gguf:`` with a recipe of ``llama-quantize``: each tensor goes through the real quantizer of its type and
            back, and the result takes the weight's place.

    Raises:
        UsageError: The format is unknown.
        CheckpointError: The folder cannot be read.
        MissingDependencyError: The quantizer is not installed.
    """
    from qcbguard_plugins.models.loading import load_full_precision

    if format == FULL_PRECISION:
        return load_full_precision(model_dir, torch.float32)
    return _load_as_gguf(model_dir, format) if format.startswith("gguf:") else _load_as_bitsandbytes(model_dir, format)


def _load_as_bitsandbytes(model_dir: Path, format: str) -> PreTrainedModel:
    from qcbguard_plugins.backends.bitsandbytes.stock import config_for, silence_notices
    from qcbguard_plugins.backends.formats import get_grid
    from qcbguard_plugins.models.skeleton import load_config, model_class

    silence_notices()
    model: PreTrainedModel = model_class(load_config(model_dir)).from_pretrained(
        model_dir,
        quantization_config=config_for(get_grid(format)),
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
    )
    use_exact_forward(model)
    return model.eval()


@torch.no_grad()
def _load_as_gguf(model_dir: Path, format: str) -> PreTrainedModel:
    from qcbguard_plugins.models.loading import load_full_precision
    from qcbguard_plugins.pipeline.plan import make_plan

    plan = make_plan(model_dir, format)
    model = load_full_precision(model_dir, torch.float32)
    for target in plan.targets:
        (grid,) = target.grids
        weight = model.get_parameter(target.name).data
        matrix = (weight.T if target.transposed else weight).contiguous()
        stored = grid.stored_values(matrix)
        weight.copy_(stored.T if target.transposed else stored)
    return model
