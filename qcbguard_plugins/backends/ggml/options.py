"""What a user of llama.cpp can say about how the model will be quantized."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.backends.ggml.grids import gguf_grid
from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.ggml import MIN_AS_PLANNED, GgmlGrid

# Flags of llama-quantize that change which tensors exist or which get which importance, in ways a plan cannot follow.
_REFUSED_FLAGS = ("--prune-layers", "--include-weights", "--exclude-weights", "--keep-split", "--allow-requantize")
OUTTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GgufOptions:
    """How the model will be converted and quantized.

    Attributes:
        quantize_path: The ``llama-quantize`` binary, which is asked for the type of every tensor. ``None`` looks for
            it on the search path; without it the types are predicted.
        quantize_args: The flags that the user will give ``llama-quantize``.
        imatrix_path: The importance matrix that the user will give it.
        library_path: A ggml library to ask; ``None`` for that of an installed package.
        min_as_planned: Share of a tensor's codes that must be stored as chosen.
        outtype: For a Hugging Face folder: the ``--outtype`` of the conversion, ``f32``, ``f16`` or ``bf16``.
    """

    quantize_path: Path | None = None
    quantize_args: tuple[str, ...] = ()
    imatrix_path: Path | None = None
    library_path: Path | None = None
    min_as_planned: float = MIN_AS_PLANNED
    outtype: str = "f32"

    def __post_init__(self) -> None:
        refused = [flag for flag in self.quantize_args if flag in (*_REFUSED_FLAGS, "--imatrix", "--dry-run")]
        if refused:
            hint = "Give the importance matrix with --imatrix." if "--imatrix" in refused else ""
            raise UsageError(f"flags of llama-quantize that a plan cannot follow: {', '.join(refused)}", remedy=hint)
        if not 0 <= self.min_as_planned <= 1:
            raise UsageError(f"--min-as-planned must lie between 0 and 1, got {self.min_as_planned}")
        if self.outtype not in OUTTYPES:
            raise UsageError(f"--outtype must be one of {', '.join(OUTTYPES)}, got {self.outtype!r}")
        if self.quantize_path is not None and not self.quantize_path.is_file():
            raise UsageError(f"--llama-quantize {self.quantize_path} is not a file")

    def find_binary(self) -> Path | None:
        """The binary that the user named, or the one on the search path, or none."""
        if self.quantize_path is not None:
            return self.quantize_path
        found = shutil.which("llama-quantize")
        return Path(found) if found else None

    def grid(self, type_name: str, *, outtype: torch.dtype | None = None, importance: Tensor | None = None) -> GgmlGrid:
        """The grid of a tensor type under these options; see :func:`~qcbguard_plugins.backends.ggml.grids.gguf_grid`.

        Args:
            type_name: ggml's name of the type.
            outtype: Dtype of the GGUF file; that of the options, if ``None``.
            importance: The tensor's importance matrix.
        """
        return gguf_grid(
            type_name,
            outtype=outtype or OUTTYPES[self.outtype],
            importance=importance,
            library_path=self.library_path,
            min_as_planned=self.min_as_planned,
        )
