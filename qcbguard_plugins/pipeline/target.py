"""A tensor that the stock quantizer will read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.grids import Grid


@dataclass(frozen=True)
class Layer:
    """How the weight of a linear layer is stored and read.

    Attributes:
        transposed: True for ``[in_features, out_features]``, as in GPT-2's Conv1D.
        read_dtype: Dtype in which the quantizer will read it; ``None`` for the dtype that it has.
        grid: Its grid, where it is not that of the run.
        inputs_of: Name of the module whose inputs it works on, where that is another: an embedding table that is tied
            to the output layer is calibrated for the latter. ``None`` for a table that multiplies nothing; a method
            that needs calibration leaves it to stochastic rounding, which is what feedback is without inputs.
        is_shared: True where quantizers of other grids will read the outcome too: only unbiased rounding serves them.
    """

    transposed: bool = False
    read_dtype: torch.dtype | None = None
    grid: Grid | None = None
    inputs_of: str | None = ""
    is_shared: bool = False


def as_read(stored: Tensor, layer: Layer) -> Tensor:
    """The weight as the quantizer reads it, ``[out_features, in_features]``."""
    return (stored.T if layer.transposed else stored).to(layer.read_dtype or stored.dtype)


@dataclass(frozen=True)
class Target:
    """A tensor that the stock quantizer will read.

    Attributes:
        name: Parameter name in the model.
        key: Name in the checkpoint.
        shape: ``(out_features, in_features)`` as the quantizer reads it.
        dtype: Stored dtype.
        read_dtype: Dtype in which transformers loads it unless told otherwise: that of the configuration where it is
            coarser than the stored one. A weight planned on the coarser grid lands from both.
        transposed: True where the checkpoint stores ``[in_features, out_features]``.
        formats: The formats that will read it; a GGUF format by the type that this tensor gets, as ``gguf:Q6_K``.
        stored_name: Its name in a GGUF file.
        inputs_of: See :class:`~qcbguard_plugins.pipeline.target.Layer`.
    """

    name: str
    key: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read_dtype: torch.dtype
    transposed: bool
    formats: tuple[str, ...]
    stored_name: str = ""
    inputs_of: str | None = ""

    @property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]
