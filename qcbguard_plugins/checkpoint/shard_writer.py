"""A safetensors file that is filled tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qcbguard_plugins.checkpoint.journal import Span

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


def make_room(path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Span]:
    """Write the header of a safetensors file; what lies behind it in an existing file stays.

    Args:
        path: The file, new or made by the same call before.
        tensors: Dtype and shape of each tensor, by name.

    Returns:
        Where each of them lies in the file.
    """
    header, begins, end = {}, {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(-(-len(encoded) // _ALIGNMENT) * _ALIGNMENT)
    path.touch()
    with path.open("r+b") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        data = file.tell()
        file.truncate(data + end)
    return {name: Span(name, dtype, shape, path, data + begins[name]) for name, (dtype, shape) in tensors.items()}
