"""Guard and verify a tensor of a checkpoint segment by segment, so that no tensor is ever in memory as a whole.

Each segment is read, rounded, written, read back, and handed to the stock quantizer, whose codes must be those planned.
Segments are worked on side by side; the hashes are taken in their order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from torch import Tensor

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.threads import stream_over_threads
from qcbguard_plugins.checkpoint import TensorEntry, Workspace
from qcbguard_plugins.checkpoint.journal import bytes_of
from qcbguard_plugins.checkpoint.manifest import TensorRecord, TensorVerdict, other_codes
from qcbguard_plugins.grids import CodebookGrid, Grid, Int8Grid
from qcbguard_plugins.pipeline.settings import Guard
from qcbguard_plugins.rounding.guard_weight import Tally, guard_segment, weights_per_segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcbguard_plugins.pipeline.target import Target


def goes_in_one_pass(target: Target, grids: Sequence[Grid], guard: Guard) -> bool:
    """Whether no weight depends on one outside its segment, and bitsandbytes can be asked about segments alone."""
    known = len(grids) == 1 and isinstance(grids[0], (CodebookGrid, Int8Grid))
    return known and not target.transposed and not guard.method.needs_calibration


def bytes_in_one_pass(target: Target, grid: Grid) -> int:
    """What :func:`guard_in_one_pass` holds in memory, at most."""
    # The segment as stored, guarded, written and read back; its codes, planned and stored; their float32 in runs.
    a_weight = 4 * target.dtype.itemsize + (target.read_dtype != target.dtype) * 2 * target.read_dtype.itemsize + 4
    in_work = 2 * torch.get_num_threads() + 1 if torch.get_num_threads() > 1 else 1
    return in_work * a_weight * min(target.num_weights, weights_per_segment(grid, target.shape))


def guard_in_one_pass(
    target: Target, entry: TensorEntry, grid: Grid, guard: Guard, workspace: Workspace
) -> tuple[TensorRecord, TensorVerdict]:
    """Guard a tensor into its place in the folder in the making, and compare what bitsandbytes stores for it.

    Args:
        target: The tensor, one that :func:`goes_in_one_pass`.
        entry: Where the source has it.
        grid: Its grid.
        guard: The method, with its seed.
        workspace: The folder in the making.

    Raises:
        UnguardableError: See :func:`qcbguard_plugins.rounding.guard_weight`.
    """
    work = _Pass(target, entry, grid, guard, workspace)
    step = weights_per_segment(grid, target.shape)
    source, guarded, codes = xxhash.xxh3_128(), xxhash.xxh3_128(), hashlib.sha256()
    tally, other_dtype = Tally(), None
    for done in stream_over_threads(work.guard, range(0, target.num_weights, step)):
        source.update(bytes_of(done.source))
        guarded.update(bytes_of(done.guarded))
        codes.update(bytes_of(done.codes))
        tally += done.tally
        other_dtype = other_dtype or done.other_dtype
        work.spare.append(done.source)
    tally.check(grid, target.name)
    record = TensorRecord(
        name=target.name,
        key=target.key,
        shape=target.shape,
        transposed=False,
        dtype=dtype_name(target.dtype),
        read_dtype=dtype_name(target.read_dtype),
        num_weights=target.num_weights,
        num_moved=tally.num_moved,
        num_frozen=tally.num_frozen,
        relative_change=tally.relative_change(),
        num_landed=target.num_weights,
        codes_sha256=codes.hexdigest(),
        format=",".join(target.formats),
        stored_name=target.stored_name,
    )
    workspace.finish(entry, source.hexdigest(), guarded.hexdigest(), record)
    reason = other_codes(other_dtype) if other_dtype else ""
    return record, TensorVerdict(name=target.name, as_planned=not reason, reason=reason)


@dataclass(frozen=True)
class _Segment:
    """A segment that was guarded; all tensors are flat.

    Attributes:
        source: Its weights in the source.
        guarded: What was written for them.
        codes: The plan.
        tally: What was counted.
        other_dtype: A dtype in which the stock quantizer would store other codes; ``None`` for none.
    """

    source: Tensor
    guarded: Tensor
    codes: Tensor
    tally: Tally
    other_dtype: torch.dtype | None


class _Pass:
    """What is done with each segment of one tensor.

    Attributes:
        spare: Memory that is not in use, for segments to come: to get it from the system each time would take longer
            than to read into it.
    """

    def __init__(self, target: Target, entry: TensorEntry, grid: Grid, guard: Guard, workspace: Workspace) -> None:
        assert guard.seed is not None, "the seed is drawn once a run"
        self.spare: list[Tensor] = []
        self._target, self._entry, self._grid, self._workspace = target, entry, grid, workspace
        self._method, self._seed = guard.method, guard.seed
        self._size = min(target.num_weights, weights_per_segment(grid, target.shape))
        self._dtypes = sorted({target.dtype, target.read_dtype}, key=str)

    def guard(self, first: int) -> _Segment:
        """Guard the segment that begins with this weight."""
        target, grid = self._target, self._grid
        count = min(self._size, target.num_weights - first)
        source, back = self._memory()[:count], self._memory()
        self._workspace.read_part(self._entry, first, source)
        read = source.to(target.read_dtype)
        rounded, codes, tally = guard_segment(
            read, first, target.shape, grid, self._method, seed=self._seed, name=target.name
        )
        guarded = rounded.to(target.dtype)
        self._workspace.write_part(self._entry, first, guarded)
        self._workspace.read_back(self._entry, first, back[:count])
        other_dtype = self._other_dtype(back[:count], codes)
        self.spare.append(back)
        return _Segment(source, guarded, codes, tally, other_dtype)

    def _other_dtype(self, back: Tensor, codes: Tensor) -> torch.dtype | None:
        from qcbguard_plugins.backends.bitsandbytes.checked import checked_codes

        shape = (1, -1) if isinstance(self._grid, CodebookGrid) else (-1, self._target.shape[1])
        quantize, planned = checked_codes(), codes.view(shape)
        for dtype in self._dtypes:
            # Many times as fast as torch.equal is on bytes.
            if not np.array_equal(quantize(back.to(dtype).view(shape), self._grid).numpy(), planned.numpy()):
                return dtype
        return None

    def _memory(self) -> Tensor:
        try:
            return self.spare.pop()
        except IndexError:
            return torch.empty(self._size, dtype=self._target.dtype)
