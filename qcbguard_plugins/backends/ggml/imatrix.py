"""Importance matrices, as ``llama-imatrix`` writes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.gguf_reader import open_gguf
from qcbguard_plugins.errors import CheckpointError

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """The importance of every column of every tensor that was seen.

    Attributes:
        columns: float32 ``[num_matrices, in_features]`` by tensor name; one row a matrix, several for stacked experts.
        digest: SHA-256 of the file.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    digest: str = ""

    def of(self, name: str, num_matrices: int, num_columns: int) -> Tensor | None:
        """The importance that llama-quantize uses for a tensor; ``None`` where it uses none.

        Raises:
            CheckpointError: There is one of another size, which makes llama-quantize stop.
        """
        found = self.columns.get(name)
        if found is None:
            return None
        if found.numel() != num_matrices * num_columns:
            if name == "token_embd.weight":
                return None
            raise CheckpointError(
                f"the importance matrix holds {found.numel()} columns for {name}, not {num_matrices * num_columns}",
                remedy="It was made from another model.",
            )
        return found.view(num_matrices, num_columns)


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix.

    Raises:
        CheckpointError: The file is missing, malformed, or of the old format without a header.
    """
    if path.is_file() and path.read_bytes()[:4] != b"GGUF":
        raise CheckpointError(
            f"{path.name} is no importance matrix in GGUF form",
            remedy="Rewrite an old one with: llama-imatrix --in-file OLD.dat -o NEW.gguf",
        )
    file = open_gguf(path)
    columns = {}
    for key, tensor in file.tensors.items():
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts_tensor = file.tensors.get(name + _COUNTS)
        if counts_tensor is None or tensor.dtype != torch.float32 or counts_tensor.dtype != torch.float32:
            raise CheckpointError(f"{path.name}: {name} lacks float32 sums or counts")
        counts = file.read(name + _COUNTS).view(-1, 1)
        if tensor.num_weights % counts.shape[0]:
            raise CheckpointError(
                f"{path.name}: {tensor.num_weights} sums of {name} and {counts.shape[0]} counts do not go together"
            )
        sums = file.read(key).view(counts.shape[0], -1)
        columns[name] = torch.where(counts > 0, sums / counts, torch.ones_like(sums))
    if not columns:
        raise CheckpointError(f"{path.name} holds no importance of any tensor")
    return Imatrix(columns, hashlib.sha256(path.read_bytes()).hexdigest())
