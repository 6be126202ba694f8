"""A guarded folder in the making; see :mod:`qcbguard_plugins.checkpoint.journal`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qcbguard_plugins._util.distributed import SINGLE_PROCESS, ProcessGroup
from qcbguard_plugins.checkpoint.atomic import check_new_folder
from qcbguard_plugins.checkpoint.journal import (
    KeptWork,
    Span,
    bytes_of,
    copy_span,
    hash_bytes,
    hash_span,
    partial_of,
    read_into,
    read_span,
    resumable,
    state_of,
    write_span,
)
from qcbguard_plugins.checkpoint.manifest import TensorRecord
from qcbguard_plugins.checkpoint.reader import Checkpoint

_FOLDER: Final = "folder"


class Staging(ABC):
    """A guarded copy in the making, tensor by tensor."""

    def __init__(self, partial: Path, rank: int = 0) -> None:
        self._partial = partial
        self._kept = KeptWork(partial, rank)

    @abstractmethod
    def _source(self, key: str) -> Span:
        """Where the source has a tensor."""

    @abstractmethod
    def _target(self, key: str) -> Span:
        """Where the copy has it."""

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that a run makes up once and keeps when it is resumed, such as a seed.

        Raises:
            CheckpointError: What was kept is damaged.
        """
        return self._kept.remember(name, make)

    def read(self, key: str) -> tuple[Tensor, str]:
        """A tensor of the source, and the hash of its bytes."""
        span = self._source(key)
        data = read_span(span.path, span.begin, span.num_bytes)
        return torch.frombuffer(data, dtype=span.dtype).view(span.shape), hash_bytes(data)

    def source_hash(self, key: str) -> str:
        """The hash of a tensor's bytes in the source."""
        span = self._source(key)
        return hash_span(span.path, span.begin, span.num_bytes)

    def resumed(self, key: str) -> TensorRecord | None:
        """The record of a tensor that an interrupted run guarded and whose source is the same; ``None`` without."""
        return self._kept.resumed(self._target(key), lambda: self.source_hash(key))

    def write(self, key: str, source: str, weight: Tensor, record: TensorRecord) -> None:
        """Put a guarded tensor in the place of one of the source, which has this hash."""
        self.finish(key, source, self._kept.put(self._target(key), weight), record)

    def read_part(self, key: str, first: int, part: Tensor) -> None:
        """Fill a flat tensor with weights of the source.

        Args:
            key: Name of the tensor that holds them.
            first: Number of the first.
            part: Contiguous, of the tensor's dtype.
        """
        span = self._source(key)
        read_into(span.path, span.begin + first * part.dtype.itemsize, bytes_of(part))

    def write_part(self, key: str, first: int, part: Tensor) -> None:
        """Put guarded weights in their place; :meth:`finish` follows when all of the tensor are."""
        span = self._target(key)
        write_span(span.path, span.begin + first * part.dtype.itemsize, bytes_of(part))

    def read_back(self, key: str, first: int, part: Tensor) -> None:
        """Fill a flat tensor with the weights that the work holds."""
        span = self._target(key)
        read_into(span.path, span.begin + first * part.dtype.itemsize, bytes_of(part))

    def finish(self, key: str, source: str, guarded: str, record: TensorRecord) -> None:
        """Note that all of a tensor is in its place.

        Args:
            key: Its name.
            source: Hash of its bytes in the source, as they were read.
            guarded: Hash of the bytes that were written.
            record: What the report will say of it.
        """
        self._kept.finish(self._target(key), source, guarded, record)


class FolderStaging(Staging):
    """The folder in the making, as one of the processes that fill it sees it.

    Attributes:
        folder: The folder that will be published.
    """

    def __init__(self, partial: Path, checkpoint: Checkpoint, rank: int) -> None:
        super().__init__(partial, rank)
        self.folder = partial / _FOLDER
        self._checkpoint = checkpoint

    def kept_folder(self, name: str) -> Path:
        """A folder for what a run keeps until its target is published, and finds again when it is resumed."""
        folder = self._partial / name
        folder.mkdir(exist_ok=True)
        return folder

    def copy_rest(self, shards: Sequence[str], replaced: Collection[str]) -> None:
        """Copy all bytes of some shards except those of the tensors that will be replaced."""
        for shard in shards:
            entries = (self._checkpoint.tensors[key] for key in replaced)
            inside = sorted((entry for entry in entries if entry.shard == shard), key=lambda entry: entry.begin)
            source, target = self._checkpoint.path / shard, self.folder / shard
            size = self._checkpoint.num_bytes_of(shard)
            starts, ends = [0, *(entry.end for entry in inside)], [*(entry.begin for entry in inside), size]
            target.touch()
            with source.open("rb") as reader, target.open("r+b") as writer:
                writer.truncate(size)
                for start, end in zip(starts, ends, strict=True):
                    reader.seek(start)
                    writer.seek(start)
                    copy_span(reader, writer, end - start, source)

    def _source(self, key: str) -> Span:
        return self._span(key, self._checkpoint.path)

    def _target(self, key: str) -> Span:
        return self._span(key, self.folder)

    def _span(self, key: str, folder: Path) -> Span:
        entry = self._checkpoint.tensors[key]
        assert entry.dtype is not None, "only floating-point tensors are replaced"
        return Span(entry.key, entry.dtype, entry.shape, folder / entry.shard, entry.begin)


@contextmanager
def resumable_folder(
    target: Path, checkpoint: Checkpoint, request: Mapping[str, Any], group: ProcessGroup = SINGLE_PROCESS
) -> Iterator[FolderStaging]:
    """A folder that appears under its name when the block ends well, and is kept beside it when it is interrupted.

    Args:
        target: The name it shall have; it must not exist.
        checkpoint: The folder that is read meanwhile, which the target must not lie in.
        request: What the run is asked for, as JSON values. Only a run with the same request goes on with its work.
        group: The processes that fill it; the first of them makes and publishes it.

    Yields:
        The folder in the making. An error of the package's own removes it: the same request would meet it again.

    Raises:
        TargetExistsError: The target exists, or another run is making it.
        UsageError: The target lies in the source, or a run with another request was interrupted.
        CheckpointError: The target cannot be written, or the source changed while it was read.
    """
    target = target.absolute()
    if group.rank > 0:
        group.barrier()
        yield FolderStaging(partial_of(target), checkpoint, group.rank)
        group.barrier()
        return
    check_new_folder(target, checkpoint.path)

    def state() -> dict[str, list[int]]:
        return {shard: state_of(checkpoint.path / shard) for shard in checkpoint.shards}

    with resumable(target, _FOLDER, request, state, checkpoint.path) as partial:
        (partial / _FOLDER).mkdir(exist_ok=True)
        group.barrier()
        yield FolderStaging(partial, checkpoint, group.rank)
    group.barrier()
