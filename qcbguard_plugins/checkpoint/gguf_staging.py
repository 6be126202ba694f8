"""A guarded GGUF file in the making: the source with other values of some tensors and one more metadata entry."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from qcbguard_plugins.checkpoint.atomic import check_new_file
from qcbguard_plugins.checkpoint.gguf_reader import MAGIC, GgufFile
from qcbguard_plugins.checkpoint.journal import Span, copy_span, resumable, state_of
from qcbguard_plugins.checkpoint.staging import Staging

_FILE: Final = "file.gguf"
_STRING: Final = 8


class GgufStaging(Staging):
    """The file in the making. One tensor is in memory at a time.

    Args:
        partial: The folder that it lies in.
        source: The file to read.
        replaced: Names of the tensors that get other values.
        key: Key of the metadata entry to add; an entry of that key in the source is dropped.
        text_bytes: Room for its text: the header comes first in the file and is filled in last.
    """

    def __init__(self, partial: Path, source: GgufFile, replaced: Collection[str], key: str, text_bytes: int) -> None:
        super().__init__(partial)
        self._path = partial / _FILE
        self._file = source
        self._path.touch()
        with source.path.open("rb") as reader, self._path.open("r+b") as writer:
            self._text_at = _write_header(source, reader, writer, key, text_bytes)
            self._text_bytes = text_bytes
            self._shift = writer.tell() - source.data_begin
            self._copy_rest(reader, writer, replaced)

    def write_text(self, text: str) -> None:
        """Fill in the metadata entry; it is padded with blanks."""
        encoded = text.encode()
        if len(encoded) > self._text_bytes:
            raise ValueError(f"{len(encoded)} bytes of metadata, {self._text_bytes} were reserved")
        with self._path.open("r+b") as writer:
            writer.seek(self._text_at)
            writer.write(encoded.ljust(self._text_bytes))

    def _source(self, key: str) -> Span:
        return self._span(key, self._file.path, 0)

    def _target(self, key: str) -> Span:
        return self._span(key, self._path, self._shift)

    def _span(self, key: str, path: Path, shift: int) -> Span:
        tensor = self._file.tensors[key]
        assert tensor.dtype is not None, "only full-precision tensors are replaced"
        return Span(tensor.name, tensor.dtype, tensor.shape, path, tensor.begin + shift)

    def _copy_rest(self, reader: BinaryIO, writer: BinaryIO, replaced: Collection[str]) -> None:
        """All bytes behind the header but those of the replaced tensors, in the source's order and with its gaps."""
        size = self._file.path.stat().st_size
        inside = sorted(
            (tensor for tensor in self._file.tensors.values() if tensor.name in replaced), key=lambda t: t.begin
        )
        starts = [self._file.data_begin, *(tensor.begin + tensor.num_bytes for tensor in inside)]
        ends = [*(tensor.begin for tensor in inside), size]
        writer.truncate(size + self._shift)
        for start, end in zip(starts, ends, strict=True):
            reader.seek(start)
            writer.seek(start + self._shift)
            copy_span(reader, writer, end - start, self._file.path)


@contextmanager
def resumable_gguf(
    target: Path,
    source: GgufFile,
    request: Mapping[str, Any],
    replaced: Collection[str],
    key: str,
    text_bytes: int,
) -> Iterator[GgufStaging]:
    """A GGUF file that appears under its name when the block ends well, and is kept beside it when it is interrupted.

    Args:
        target: The name it shall have; it must not exist.
        source: The file that is read meanwhile.
        request: What the run is asked for, as JSON values. Only a run with the same request goes on with its work.
        replaced: Names of the tensors that get other values.
        key: Key of the metadata entry to add.
        text_bytes: Room for its text.

    Raises:
        TargetExistsError: The target exists, or another run is making it.
        UsageError: The target is the source, or a run with another request was interrupted.
        CheckpointError: The target cannot be written, or the source changed while it was read.
    """
    target = target.absolute()
    check_new_file(target, source.path)
    with resumable(target, _FILE, request, lambda: state_of(source.path), source.path) as partial:
        yield GgufStaging(partial, source, replaced, key, text_bytes)


def _write_header(source: GgufFile, reader: BinaryIO, writer: BinaryIO, key: str, text_bytes: int) -> int:
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
        copy_span(reader, writer, stop - start, source.path)
    encoded = key.encode()
    writer.write(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<IQ", _STRING, text_bytes))
    text_at = writer.tell()
    writer.write(b" " * text_bytes)
    reader.seek(source.metadata_end)
    copy_span(reader, writer, source.tensors_end - source.metadata_end, source.path)
    writer.write(bytes(-writer.tell() % source.alignment))
    return text_at
