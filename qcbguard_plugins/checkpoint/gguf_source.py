"""Full-precision tensors of a GGUF file, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.source import SourceTensor, WeightSource, is_target
from qcbguard_plugins.errors import CheckpointError, MissingDependencyError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_gguf(path: Path) -> WeightSource:
    """Open a GGUF file. Its tensors are mapped, not loaded; quantized ones are listed as what cannot be tested.

    Raises:
        MissingDependencyError: The gguf package is not installed.
        CheckpointError: The file is malformed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingDependencyError("reading GGUF files needs the gguf package", remedy="pip install gguf") from error
    try:
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    except Exception as error:  # the reader checks little: whatever breaks in it is an error about the file
        raise CheckpointError(f"{path.name} is not a readable GGUF file: {type(error).__name__}: {error}") from error
    names = [name for name in tensors if is_target(name, shapes[name])]
    targets = [SourceTensor(name, shapes[name], _DTYPES.get(tensors[name].tensor_type.name)) for name in names]
    return WeightSource(
        name=path.name,
        path=path,
        kind="gguf",
        targets=tuple(targets),
        num_others=len(tensors) - len(targets),
        largest_bytes=max((int(tensors[name].n_bytes) for name in names), default=0),
        _read=lambda name: _tensor(tensors[name], shapes[name]),
    )


def _tensor(stored: Any, shape: tuple[int, ...]) -> Tensor:
    dtype = _DTYPES[stored.tensor_type.name]
    return torch.frombuffer(bytearray(stored.data.tobytes()), dtype=dtype).reshape(shape)
