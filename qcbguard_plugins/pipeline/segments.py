"""Guard and verify a tensor of a checkpoint segment by segment, so that no tensor is ever in memory as a whole.

Each segment is read, rounded, written, read back, and handed to the stock quantizer, whose codes must be those planned.
Segments are worked on side by side; the hashes are taken in their order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from qcbguard_plugins._util.dtypes import dtype_name
from qcbguard_plugins._util.threads import stream_over_threads
from qcbguard_plugins.backends.formats import backend_of
from qcbguard_plugins.checkpoint.journal import bytes_of
from qcbguard_plugins.checkpoint.manifest import TensorRecord, TensorVerdict
from qcbguard_plugins.checkpoint.staging import Staging
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.settings import Guard
from qcbguard_plugins.rounding.guard_weight import Tally, guard_segment, weights_per_segment


def can_be_segmented(target: Target, guard: Guard) -> bool:
    """Whether no weight depends on one outside its segment, and the stock quantizer can be asked about segments."""
    known = len(target.grids) == 1 and target.grids[0].in_segments
    return known and not target.transposed and not guard.method.needs_calibration


def bytes_in_segments(target: Target) -> int:
    """What :func:`guard_in_segments` holds in memory, at most."""
    # The segment as stored, guarded, written and read back; its codes, planned and stored; their float32 in runs.
    stored, read = target.dtype, target.read_dtype or target.dtype
    a_weight = 4 * stored.itemsize + (read != stored) * 2 * read.itemsize + 4
    in_work = 2 * torch.get_num_threads() + 1 if torch.get_num_threads() > 1 else 1
    return in_work * a_weight * min(target.num_weights, weights_per_segment(target.grids[0], target.shape))


def guard_in_segments(target: Target, guard: Guard, staging: Staging) -> tuple[TensorRecord, TensorVerdict]:
    """Guard a target into its place in the work, and compare what the stock quantizer stores for it.

    Args:
        target: One that :func:`can_be_segmented`.
        guard: The method, its seed drawn.
        staging: The work.

    Raises:
        UnguardableError: See :func:`qcbguard_plugins.rounding.guard_weight`.
    """
    (grid,) = target.grids
    work = _Pass(target, guard, staging)
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
        read_dtype=dtype_name(target.read_dtype or target.dtype),
        num_weights=target.num_weights,
        num_moved=tally.num_moved,
        num_frozen=tally.num_frozen,
        relative_change=tally.relative_change(),
        num_as_planned=target.num_weights,
        codes_sha256=codes.hexdigest(),
        formats=target.formats,
        stored_name=target.stored_name,
    )
    staging.finish(target.key, source.hexdigest(), guarded.hexdigest(), record)
    if other_dtype is not None:
        return record, TensorVerdict.other_codes(target.name, other_dtype)
    return record, TensorVerdict(name=target.name, as_planned=True)


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

    def __init__(self, target: Target, guard: Guard, staging: Staging) -> None:
        assert guard.seed is not None, "the seed is drawn once a run"
        self.spare: list[Tensor] = []
        (self._grid,) = target.grids
        self._target, self._staging = target, staging
        self._method, self._seed = guard.method, guard.seed
        self._backend = backend_of(self._grid.name)
        self._size = min(target.num_weights, weights_per_segment(self._grid, target.shape))
        self._read_dtype = target.read_dtype or target.dtype
        self._dtypes = sorted({target.dtype, self._read_dtype}, key=str)

    def guard(self, first: int) -> _Segment:
        """Guard the segment that begins with this weight."""
        target, grid = self._target, self._grid
        count = min(self._size, target.num_weights - first)
        source, back = self._memory()[:count], self._memory()
        self._staging.read_part(target.key, first, source)
        read = source.to(self._read_dtype)
        rounded, codes, tally = guard_segment(
            read, first, target.shape, grid, self._method, seed=self._seed, name=target.name
        )
        guarded = rounded.to(target.dtype)
        self._staging.write_part(target.key, first, guarded)
        self._staging.read_back(target.key, first, back[:count])
        other_dtype = self._other_dtype(back[:count], codes)
        self.spare.append(back)
        return _Segment(source, guarded, codes, tally, other_dtype)

    def _other_dtype(self, back: Tensor, codes: Tensor) -> torch.dtype | None:
        columns = self._target.shape[1]
        planned = self._grid.matrix_of(codes, columns).numpy()
        for dtype in self._dtypes:
            stored = self._backend.quick_codes(self._grid.matrix_of(back.to(dtype), columns), self._grid)
            # Many times as fast as torch.equal is on bytes.
            if not np.array_equal(stored.numpy(), planned):
                return dtype
        return None

    def _memory(self) -> Tensor:
        try:
            return self.spare.pop()
        except IndexError:
            return torch.empty(self._size, dtype=self._target.dtype)
