"""Full-precision tensors of a GGUF file, or of all its parts, by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.gguf_parts import open_parts
from qcbguard_plugins.checkpoint.weight_source import SourceTensor, WeightSource, is_target

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_gguf(path: Path) -> WeightSource:
    """Open a GGUF file. Its tensors are mapped, not loaded; quantized ones are listed as what cannot be tested.

    Args:
        path: A whole file, or any part of one that was split: all parts are opened.

    Raises:
        CheckpointError: A file is malformed, or parts are missing.
    """
    parts = open_parts(path)
    file_of = {name: part for part in parts for name in part.tensors}
    tensors = {name: part.tensors[name] for name, part in file_of.items()}
    targets = [
        SourceTensor(name, tensor.shape, _DTYPES.get(tensor.type_name))
        for name, tensor in tensors.items()
        if is_target(name, tensor.shape)
    ]

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        data = torch.from_numpy(file_of[name].read_bytes(name).copy())
        return data.view(_DTYPES[tensor.type_name]).view(tensor.shape)

    return WeightSource(
        name=path.name,
        path=path,
        kind="gguf",
        targets=tuple(targets),
        num_others=len(tensors) - len(targets),
        largest_bytes=max((tensors[target.name].num_bytes for target in targets), default=0),
        _read=read,
    )
