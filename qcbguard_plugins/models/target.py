"""A weight of a model that a stock quantizer reads: the one form that a tensor has from the plan to the report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcbguard_plugins.grids.base import Grid


@dataclass(frozen=True)
class Target:
    """A weight that stock quantizers will read.

    Attributes:
        name: Parameter name in the model.
        shape: ``(out_features, in_features)`` as the quantizer reads it; of one matrix where there are several.
        dtype: Dtype in which it is stored.
        grids: The grids of the quantizers that will read it, one for each format.
        transposed: True where it is stored as ``[in_features, out_features]``, as in GPT-2's Conv1D.
        calibrated_by: Name of the module whose inputs it multiplies, where that is another than its own: an embedding
            table that is tied to the output head is calibrated by the head.
        has_inputs: False for a table that multiplies nothing. A method that needs calibration leaves it to stochastic
            rounding, which is what feedback is without inputs.
        read_dtype: Dtype in which the quantizers read it, where that is another than the stored one.
        key: Name in the checkpoint, where that is another.
        stored_name: Name in the file that the quantizer writes, where that is another.
        num_matrices: Number of matrices that are stored as one tensor, ``[num_matrices, out_features, in_features]``.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    grids: tuple[Grid, ...]
    transposed: bool = False
    calibrated_by: str = ""
    has_inputs: bool = True
    read_dtype: torch.dtype | None = None
    key: str = ""
    stored_name: str = ""
    num_matrices: int = 1

    @property
    def layer(self) -> str:
        """Dotted name of the module that has the weight."""
        return self.name.removesuffix(".weight")

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that will read it; a GGUF format by the type that this tensor gets, as ``gguf:Q6_K``."""
        return tuple(grid.name for grid in self.grids)

    @property
    def num_weights(self) -> int:
        return self.num_matrices * self.shape[0] * self.shape[1]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape in which a checkpoint stores it."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def turn(self, stored: Tensor) -> Tensor:
        """The weight as the quantizers read it: ``[out_features, in_features]`` in their dtype."""
        return (stored.T if self.transposed else stored).to(self.read_dtype or stored.dtype)

    def turn_back(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`turn`: the weight as it is stored."""
        return (weight.T if self.transposed else weight).to(self.dtype)
