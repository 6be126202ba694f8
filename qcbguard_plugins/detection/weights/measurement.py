"""The weight tests' statistics, tensor by tensor, on one format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcbguard_plugins.detection.weights import residual, spectral
from qcbguard_plugins.detection.weights.null_grids import NEAR_GRID, reproduces, roundings, sign_surrogate
from qcbguard_plugins.detection.weights.thresholds import ON_GRID
from qcbguard_plugins.grids.base import Grid


@dataclass
class FormatMeasurements:
    """Statistics of the tensors on one format, the exact grid first and its neighbours after it.

    Attributes:
        names: The tensors that were tested.
        on_grid: The tensors that lie on the grid already.
        edge_ratios: One row a tensor of :func:`~qcbguard_plugins.detection.weights.spectral.edge_ratio`.
        histograms: float64 ``[1 + num_neighbours, NUM_BINS]`` a tensor.
    """

    names: list[str] = field(default_factory=list)
    on_grid: list[str] = field(default_factory=list)
    edge_ratios: list[list[float]] = field(default_factory=list)
    histograms: list[Tensor] = field(default_factory=list)

    def add(
        self,
        name: str,
        part: Tensor,
        grid: Grid,
        inflations: Sequence[float],
        start: Tensor,
        generator: torch.Generator,
    ) -> None:
        """Measure one tensor.

        Args:
            name: Its name.
            part: ``[rows, in_features]``, the tensor or some of its rows.
            grid: Its grid.
            inflations: Of the neighbouring grids.
            start: From :func:`~qcbguard_plugins.detection.weights.spectral.starting_vectors`.
            generator: Source of the surrogates' signs.
        """
        if reproduces(part, grid) >= ON_GRID:
            self.on_grid.append(name)
            return
        edge_ratios, histograms, energies = [], [], []
        exact = None
        for rounding in roundings(part, grid, inflations):
            exact = rounding.error if exact is None else exact
            edge_ratios.append(spectral.edge_ratio(rounding.error, start))
            histograms.append(residual.histogram(rounding.position))
            energies.append(float(rounding.error.square().mean()))
        if exact is not None and energies[0] < NEAR_GRID * sum(energies[1:]) / len(inflations):
            surrogates = (sign_surrogate(exact, generator) for _ in inflations)
            edge_ratios[1:] = [spectral.edge_ratio(surrogate, start) for surrogate in surrogates]
        self.names.append(name)
        self.edge_ratios.append(edge_ratios)
        self.histograms.append(torch.stack(histograms))

    def extend(self, later: FormatMeasurements) -> None:
        """Add the statistics of later tensors."""
        self.names += later.names
        self.on_grid += later.on_grid
        self.edge_ratios += later.edge_ratios
        self.histograms += later.histograms
