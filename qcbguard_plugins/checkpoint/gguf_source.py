"""Full-precision tensors of a GGUF file, by name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint import gguf_reader
from qcbguard_plugins.checkpoint.weight_source import SourceTensor, WeightSource, is_target

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_gguf(path: Path) -> WeightSource:
    """Open a GGUF file. Its tensors are mapped, not loaded; quantized ones are listed as what cannot be tested.

    Raises:
        CheckpointError: The file is malformed.
    """
    file = gguf_reader.open_gguf(path)
    targets = [
        SourceTensor(name, tensor.shape, _DTYPES.get(tensor.type_name))
        for name, tensor in file.tensors.items()
        if is_target(name, tensor.shape)
    ]

    def read(name: str) -> Tensor:
        tensor = file.tensors[name]
        return torch.from_numpy(file.read_bytes(name).copy()).view(_DTYPES[tensor.type_name]).view(tensor.shape)

    return WeightSource(
        name=path.name,
        path=path,
        kind="gguf",
        targets=tuple(targets),
        num_others=len(file.tensors) - len(targets),
        largest_bytes=max((file.tensors[target.name].num_bytes for target in targets), default=0),
        _read=read,
    )
