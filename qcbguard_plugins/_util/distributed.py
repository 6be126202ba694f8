"""Several processes that share one run, on one machine or on many: ``torchrun`` starts them, gloo connects them.

What each of them computes depends on names and seeds alone, so the result has the same bytes for any number of them.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, distributed

from qcbguard_plugins.errors import ProcessGroupError

T = TypeVar("T")

# Shares are balanced beforehand, but disks and neighbours are not: the first to finish may wait for hours.
_TIMEOUT: Final = datetime.timedelta(days=2)


@dataclass(frozen=True)
class ProcessGroup:
    """One process among those that share a run.

    Every method that exchanges something must be called by all processes, and raises
    :class:`~qcbguard_plugins.errors.ProcessGroupError` where one of them is gone.

    Attributes:
        rank: Its number, from 0.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def partition(self, items: Sequence[T], cost: Callable[[T], int]) -> list[T]:
        """The items that this process works on, in their order; with those of the others they are all items, once.

        Args:
            items: The same in every process.
            cost: What an item costs, in any unit; the costliest are dealt out first.
        """
        loads = [(0, rank) for rank in range(self.world_size)]
        mine = []
        for index in sorted(range(len(items)), key=lambda index: -cost(items[index])):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + cost(items[index]), rank))
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of the processes."""
        if self.world_size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.world_size
        with _named_errors():
            distributed.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]

    def broadcast(self, value: T, rank: int = 0) -> T:
        """The value that the first process passed, or the one with another rank."""
        if self.world_size == 1:
            return value
        box = [value]
        with _named_errors():
            distributed.broadcast_object_list(box, src=rank)
        return box[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """The tensors that the process with this rank passed."""
        if self.world_size == 1:
            return dict(tensors)
        shapes = self.broadcast({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, rank)
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name] if rank == self.rank else torch.empty(shape, dtype=dtype)
            with _named_errors():
                distributed.broadcast(tensor, src=rank)
            received[name] = tensor
        return received

    def barrier(self) -> None:
        """Go on when all processes have come here."""
        if self.world_size > 1:
            with _named_errors():
                distributed.barrier()


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessGroupError(
            "another process of this run ended",
            remedy="Its own error stands with its rank. What is done is kept: run the same command again.",
        ) from error


SINGLE_PROCESS: Final = ProcessGroup()


def join_process_group() -> ProcessGroup:
    """The process group that ``torchrun`` or ``accelerate launch`` started this process in; alone where neither did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SINGLE_PROCESS
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_TIMEOUT)
    return ProcessGroup(distributed.get_rank(), distributed.get_world_size())
