"""What a stock quantizer does to a weight, as pure maths."""

from __future__ import annotations

from qcbguard_plugins.grids.affine import AffineGrid
from qcbguard_plugins.grids.base import Grid, Lattice, cut_blocks
from qcbguard_plugins.grids.codebook import CodebookGrid
from qcbguard_plugins.grids.int8 import Int8Grid
from qcbguard_plugins.grids.integer import IntegerGrid

__all__ = ["AffineGrid", "CodebookGrid", "Grid", "Int8Grid", "IntegerGrid", "Lattice", "cut_blocks"]
