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

from qcbguard_plugins.errors import TeamError

T = TypeVar("T")

# Shares are balanced beforehand, but disks and neighbours are not: the first to finish may wait for hours.
_TIMEOUT: Final = datetime.timedelta(days=2)


@dataclass(frozen=True)
class Team:
    """One process among those that share a run.

    Every method that exchanges something must be called by all processes, and raises
    :class:`~qcbguard_plugins.errors.TeamError` where one of them is gone.

    Attributes:
        rank: Its number, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T], cost: Callable[[T], int]) -> list[T]:
        """The items that this process works on, in their order; with those of the others they are all items, once.

        Args:
            items: The same in every process.
            cost: What an item costs, in any unit; the costliest are dealt out first.
        """
        loads = [(0, rank) for rank in range(self.size)]
        mine = []
        for index in sorted(range(len(items)), key=lambda index: -cost(items[index])):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + cost(items[index]), rank))
            if rank == self.rank:
                mine.append(index)
        return [items[index] for index in sorted(mine)]

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of the processes."""
        if self.size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.size
        with _named_errors():
            distributed.all_gather_object(gathered, list(items))
        return [item for part in gathered for item in part]

    def first(self, value: T, rank: int = 0) -> T:
        """The value that the first process passed, or the one with another rank."""
        if self.size == 1:
            return value
        box = [value]
        with _named_errors():
            distributed.broadcast_object_list(box, src=rank)
        return box[0]

    def send(self, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """The tensors that the process with this rank passed."""
        if self.size == 1:
            return dict(tensors)
        shapes = self.first({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, rank)
        received = {}
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name] if rank == self.rank else torch.empty(shape, dtype=dtype)
            with _named_errors():
                distributed.broadcast(tensor, src=rank)
            received[name] = tensor
        return received

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            with _named_errors():
                distributed.barrier()


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TeamError(
            "another process of this run ended",
            remedy="Its own error stands with its rank. What is done is kept: run the same command again.",
        ) from error


ALONE: Final = Team()


def join_team() -> Team:
    """The team that ``torchrun`` or ``accelerate launch`` started this process in; alone where neither did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_TIMEOUT)
    return Team(distributed.get_rank(), distributed.get_world_size())
