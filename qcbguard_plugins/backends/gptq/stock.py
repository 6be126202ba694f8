"""The stock quantizer itself: its arguments as a format, and which of the planned codes it stored."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from qcbguard_plugins.backends.gptq.packed import READABLE_BITS, PackedLayer
from qcbguard_plugins.errors import MissingDependencyError, UnguardableError, UsageError
from qcbguard_plugins.grids import AffineGrid
from qcbguard_plugins.models.skeleton import require_transformers

_FORMAT = re.compile(r"gptq-w(\d)(?:g(\d+))?(-asym)?")

# A grid point moves only where the errors that scale holders feed forward add up to half a step. The least share of a
# tensor's codes that must come through; measured in docs/toolchains.md.
MIN_AS_PLANNED = {True: 0.96, False: 0.995}
"""By symmetry: without it the holders lie on the grid too."""


def require_gptq() -> Any:
    """The gptqmodel module.

    Raises:
        MissingDependencyError: It, Optimum or transformers is missing.
    """
    require_transformers()
    try:
        import gptqmodel
        import optimum.gptq  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"GPTQ needs gptqmodel and optimum: {error}", remedy="pip install 'qcbguard-plugins[gptq]'"
        ) from error
    return gptqmodel


def affine_grid(format: str) -> AffineGrid:
    """The grid of a format such as ``gptq-w4g128``.

    Raises:
        UsageError: There is no such format.
    """
    match = _FORMAT.fullmatch(format)
    if match is None:
        raise UsageError(f"unknown format {format!r}", remedy="GPTQ's are spelled like gptq-w4g128 and gptq-w8-asym.")
    return AffineGrid(int(match[1]), int(match[2]) if match[2] else None, symmetric=not match[3])


def grid_of(bits: int, group_size: int, symmetric: bool, desc_act: bool) -> AffineGrid:
    """The grid that GPTQ's arguments stand for.

    Raises:
        UnguardableError: The groups are not known before GPTQ has seen its calibration data, or the codes cannot be
            read back.
        UsageError: The bits or the group size are none that the grid has.
    """
    if desc_act and group_size != -1:
        raise UnguardableError(
            "desc_act=True with groups puts columns together by the size of their inputs, so the groups cannot be "
            "planned",
            remedy="Leave desc_act=False with act_group_aware=True, which sorts columns and keeps the groups; or use "
            "group_size=-1, or GPTQModel directly with static_groups=True.",
        )
    if bits not in READABLE_BITS:
        raise UnguardableError(f"{bits}-bit codes cannot be compared with the plan: GPTQModel stores them in planes")
    return AffineGrid(bits, None if group_size == -1 else group_size, symmetric)


def why_not_as_planned(planned: Tensor, stored: PackedLayer, grid: AffineGrid) -> tuple[int, str]:
    """Compare a stored layer with the plan.

    Args:
        planned: uint8 ``[out_features, in_features]``.
        stored: What GPTQ stored.
        grid: The grid of the plan.

    Returns:
        The number of weights stored with the planned code, and what is wrong; empty where nothing is.
    """
    if stored.codes.shape != planned.shape:
        return 0, f"stored with shape {tuple(stored.codes.shape)}"
    columns = planned.shape[1]
    width = grid.group_size or columns
    if (stored.groups != stored.groups.new_tensor(range(columns)) // width).any():
        return 0, "stored in other groups of columns than planned"
    num_as_planned = int((stored.codes == planned).sum())
    wanted = MIN_AS_PLANNED[grid.symmetric]
    if num_as_planned < wanted * planned.numel():
        return (
            num_as_planned,
            f"{num_as_planned / planned.numel():.2%} of the codes are those planned, {wanted:.1%} are wanted",
        )
    return num_as_planned, ""
