"""Weights of a model by name, whatever file holds them: read without its classes and without running anything.

A folder of safetensors files, one safetensors file, or a GGUF file. Names and shapes are untrusted; which tensors a
stock quantizer would take is decided from them alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.loaded_files import PassedOver

# Matrices that no stock quantizer rounds, or that GGUF rounds on a grid of its own kind: embeddings, output layers,
# routers.
_NOT_A_TARGET = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|lm_head|norm\w*|ln\w*|layernorm\w*|router|score|classifier|pooler|token_embd|"
    r"position_embd|shared|relative_attention_bias|ffn_gate_inp\w*)(?=\.)"
    r"|^output\.weight$|(^|\.)(mlp|block_sparse_moe|feed_forward)\.gate\.weight$"
)
_TARGET = re.compile(r"\.weight$|experts?\.(gate_up_proj|down_proj|gate_proj|up_proj)$")

_FULL_PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_SIDE = 16
_SMALLEST_SIZE = 2048


@dataclass(frozen=True)
class SourceTensor:
    """A matrix that a stock quantizer would round.

    Attributes:
        name: Its name in the file.
        shape: Shape in the file.
        dtype: Dtype in the file; ``None`` for one that is not full precision.
        transposed: True where the file stores ``[in_features, out_features]``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    transposed: bool = False

    @property
    def unusable(self) -> str:
        """Why it cannot be tested, or an empty string."""
        if self.dtype not in _FULL_PRECISION:
            return "its dtype is not full precision, so its rounding lies in the past"
        if (
            self.matrix_shape[0] < _SMALLEST_SIDE
            or self.matrix_shape[1] < _SMALLEST_SIDE
            or self.num_weights < _SMALLEST_SIZE
        ):
            return "too small to test"
        return ""

    @property
    def num_weights(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def num_bytes(self) -> int:
        """Its size in the file; of one that is not full precision, as if it had a byte a weight."""
        return self.num_weights * (self.dtype.itemsize if self.dtype is not None else 1)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``; experts that are stored together count as rows of one matrix."""
        if len(self.shape) == 3:
            return self.shape[0] * self.shape[1], self.shape[2]
        return (self.shape[1], self.shape[0]) if self.transposed else (self.shape[0], self.shape[1])


@dataclass(frozen=True)
class WeightSource:
    """A model's weights.

    Attributes:
        name: Name of the folder or file.
        path: The folder or file.
        kind: ``safetensors`` or ``gguf``.
        targets: Matrices that a stock quantizer would round, in the order of the file.
        num_others: Number of tensors that it would leave alone.
        largest_bytes: Size of the largest target in the file.
        passed_over: Other weight files of the folder, which a load takes only where it is told to.
    """

    name: str
    path: Path
    kind: str
    targets: tuple[SourceTensor, ...]
    num_others: int
    largest_bytes: int
    _read: Callable[[str], Tensor]
    passed_over: tuple[PassedOver, ...] = ()

    def read(self, target: SourceTensor) -> Tensor:
        """Read one target as ``[out_features, in_features]``."""
        tensor = self._read(target.name)
        if target.transposed:
            return tensor.T.contiguous()
        return tensor.reshape(target.matrix_shape)


def is_target(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stock quantizer would round a tensor of this name and shape."""
    is_matrix = len(shape) == 2 or (len(shape) == 3 and "expert" in name) or (len(shape) == 3 and "_exps" in name)
    return is_matrix and 0 not in shape and bool(_TARGET.search(name)) and not _NOT_A_TARGET.search(name)


def may_be_target(name: str, shape: tuple[int, ...]) -> bool:
    """The same where the model's class is code of its own, which may give a matrix any name."""
    return len(shape) in (2, 3) and 0 not in shape and not _NOT_A_TARGET.search(name)
