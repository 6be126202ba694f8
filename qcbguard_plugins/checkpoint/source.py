"""Weights of a model by name, whatever file holds them: read without its classes and without running anything.

A folder of safetensors files, one safetensors file, or a GGUF file. Names and shapes are untrusted; which tensors a
stock quantizer would take is decided from them alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.reader import Checkpoint, open_checkpoint, read_header
from qcbguard_plugins.errors import CheckpointError, UsageError

# Matrices that no stock quantizer rounds, or that GGUF rounds on a grid of its own kind: embeddings, output layers,
# routers.
_NOT_A_TARGET = re.compile(
    r"(^|[._])(embed\w*|wte|wpe|lm_head|norm\w*|ln\w*|layernorm\w*|router|score|classifier|pooler|token_embd|"
    r"position_embd|shared|relative_attention_bias|ffn_gate_inp\w*)(?=\.)"
    r"|^output\.weight$|(^|\.)(mlp|block_sparse_moe|feed_forward)\.gate\.weight$"
)
_TARGET = re.compile(r"\.weight$|experts?\.(gate_up_proj|down_proj|gate_proj|up_proj)$")

# Layer kinds that GPT-2's family keeps as [in_features, out_features]. GPT-BigCode has the same names the usual way
# round.
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)\.weight$")
_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}

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
    """

    name: str
    path: Path
    kind: str
    targets: tuple[SourceTensor, ...]
    num_others: int
    largest_bytes: int
    _read: Callable[[str], Tensor]

    def read(self, target: SourceTensor) -> Tensor:
        """Read one target as ``[out_features, in_features]``."""
        tensor = self._read(target.name)
        if target.transposed:
            return tensor.T.contiguous()
        return tensor.reshape(target.matrix_shape)


def open_weights(path: Path | str) -> WeightSource:
    """Open a model for reading.

    Args:
        path: A folder with ``config.json`` and safetensors files, a ``.safetensors`` file, or a ``.gguf`` file.

    Raises:
        UsageError: Nothing is there, or it is none of these.
        CheckpointError: It cannot be read safely, or holds no matrix that a quantizer would round.
    """
    path = Path(path)
    if path.is_dir():
        source = _from_safetensors(open_checkpoint(path))
    elif not path.is_file():
        raise UsageError(f"{path} does not exist", remedy="Give a folder, a .safetensors file or a .gguf file.")
    elif path.suffix == ".safetensors":
        entries = {entry.key: entry for entry in read_header(path)}
        source = _from_safetensors(Checkpoint(path.parent, {}, (path.name,), entries), name=path.name)
    elif path.suffix == ".gguf":
        from qcbguard_plugins.checkpoint.gguf_source import open_gguf

        source = open_gguf(path)
    else:
        raise UsageError(f"{path.name} is neither a .safetensors nor a .gguf file", remedy="Pickles are never opened.")
    if not source.targets:
        raise CheckpointError(
            f"{source.name} holds no matrix that a stock quantizer would round ({source.num_others} other tensors)",
            remedy="Targets are matrices named *.weight that are not embeddings, norms, routers or the output layer.",
        )
    return source


def is_target(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stock quantizer would round a tensor of this name and shape."""
    is_matrix = len(shape) == 2 or (len(shape) == 3 and "expert" in name) or (len(shape) == 3 and "_exps" in name)
    return is_matrix and 0 not in shape and bool(_TARGET.search(name)) and not _NOT_A_TARGET.search(name)


def _from_safetensors(checkpoint: Checkpoint, name: str = "") -> WeightSource:
    conv1d = _stores_conv1d(checkpoint)
    entries = [entry for entry in checkpoint.tensors.values() if is_target(entry.key, entry.shape)]
    targets = [
        SourceTensor(entry.key, entry.shape, entry.dtype, conv1d and bool(_CONV1D.search(entry.key)))
        for entry in entries
    ]
    return WeightSource(
        name=name or checkpoint.path.resolve().name,
        path=checkpoint.path,
        kind="safetensors",
        targets=tuple(targets),
        num_others=len(checkpoint.tensors) - len(targets),
        largest_bytes=max((entry.num_bytes for entry in entries), default=0),
        _read=checkpoint.read,
    )


def _stores_conv1d(checkpoint: Checkpoint) -> bool:
    """By the configuration, else by the shape of a layer that widens its input."""
    model_type: Any = checkpoint.config.get("model_type")
    if isinstance(model_type, str):
        return model_type in _CONV1D_TYPES
    return any(
        len(entry.shape) == 2 and entry.shape[1] > entry.shape[0]
        for entry in checkpoint.tensors.values()
        if re.search(r"(c_fc|c_attn)\.weight$", entry.key)
    )
