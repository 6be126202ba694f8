"""Write a GGUF file that differs from its source in the bytes of some tensors and in one metadata entry."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.gguf_reader import MAGIC, GgufFile, GgufTensor
from qcbguard_plugins.errors import CheckpointError

_BYTES_PER_COPY = 1 << 24
_STRING = 8
_MAX_PENDING = 2


def rewrite_gguf(
    source: GgufFile,
    target: Path,
    replaced: Collection[str],
    new_weight: Callable[[GgufTensor], Tensor],
    key: str,
    text: Callable[[], str],
    reserved_bytes: int,
) -> None:
    """Copy a GGUF file and replace the values of some tensors on the way; no more than three are in memory at a time.

    Args:
        source: The file to read.
        target: The file to write.
        replaced: Names of the tensors to replace.
        new_weight: Called with each of them in the order of their bytes; returns a tensor of its shape and dtype.
        key: Key of the metadata entry to add; an entry of that key in the source is dropped.
        text: Its text, asked for when all tensors are written. It is padded with blanks.
        reserved_bytes: Room for the text: the header comes first in the file and is filled in last.
    """
    with source.path.open("rb") as reader, target.open("wb") as writer:
        text_at = _write_header(source, reader, writer, key, reserved_bytes)
        with _Behind(writer) as behind:
            _write_tensors(source, replaced, new_weight, reader, behind)
        encoded = text().encode()
        if len(encoded) > reserved_bytes:
            raise ValueError(f"{len(encoded)} bytes of metadata, {reserved_bytes} were reserved")
        writer.seek(text_at)
        writer.write(encoded.ljust(reserved_bytes))


class _Behind:
    """Writes on a thread of its own, so that the next tensor is guarded meanwhile; at most two wait to be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        """Write later what must not change until then; an error of an earlier write is raised here or on leaving."""
        if len(self._pending) == _MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, data))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=error[0] is not None)
        if error[0] is None:
            for write in self._pending:
                write.result()


def _write_header(source: GgufFile, reader: BinaryIO, writer: BinaryIO, key: str, reserved_bytes: int) -> int:
    """The source's metadata without one entry, that entry left blank, and the list of tensors as it is.

    Returns:
        Offset of the blank text.
    """
    dropped = source.spans.get(key)
    writer.write(MAGIC)
    num_metadata = source.num_metadata + (dropped is None)
    writer.write(struct.pack("<IQQ", source.version, len(source.tensors), num_metadata))
    first = min((start for start, _ in source.spans.values()), default=source.metadata_end)
    for start, stop in (
        [(first, source.metadata_end)] if dropped is None else [(first, dropped[0]), (dropped[1], source.metadata_end)]
    ):
        reader.seek(start)
        _copy(reader, writer, stop - start, source.path)
    encoded = key.encode()
    writer.write(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<IQ", _STRING, reserved_bytes))
    text_at = writer.tell()
    writer.write(b" " * reserved_bytes)
    reader.seek(source.metadata_end)
    _copy(reader, writer, source.tensors_end - source.metadata_end, source.path)
    writer.write(bytes(-writer.tell() % source.alignment))
    return text_at


def _write_tensors(
    source: GgufFile,
    replaced: Collection[str],
    new_weight: Callable[[GgufTensor], Tensor],
    reader: BinaryIO,
    writer: _Behind,
) -> None:
    """All bytes behind the header, in the source's order and with its gaps."""
    end_of_file = source.path.stat().st_size
    reader.seek(source.data_begin)
    for tensor in sorted(source.tensors.values(), key=lambda tensor: tensor.begin):
        if tensor.name not in replaced:
            continue
        _copy(reader, writer, tensor.begin - reader.tell(), source.path)
        new = new_weight(tensor)
        if new.dtype != tensor.dtype or tuple(new.shape) != tensor.shape:
            raise ValueError(f"{tensor.name}: {new.dtype} {tuple(new.shape)} cannot replace {tensor}")
        writer.write(new.contiguous().view(-1).view(torch.uint8).numpy().data)
        reader.seek(tensor.begin + tensor.num_bytes)
    _copy(reader, writer, end_of_file - reader.tell(), source.path)


def _copy(reader: BinaryIO, writer: BinaryIO | _Behind, num_bytes: int, source: Path) -> None:
    while num_bytes > 0:
        data = reader.read(min(num_bytes, _BYTES_PER_COPY))
        if not data:
            raise CheckpointError(f"{source.name} became shorter while it was read")
        num_bytes -= len(data)
        writer.write(data)
