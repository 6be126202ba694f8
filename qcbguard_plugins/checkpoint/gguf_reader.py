"""Find out what a GGUF file holds, from its header alone.

A GGUF file is a header (metadata, then the name, shape, type and offset of every tensor) followed by the tensors'
bytes. The file is input like any other: each count, length and offset is checked against the file's size
before it is used.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 4

# Number, name, weights a block and bytes a block of every type that a file may hold.
_PLAIN_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
}  # fmt: skip
_OTHER_QUANTIZED_TYPES = {
    9: ("Q8_1", 32, 40), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_GUARDED_TYPES = {t.number: (t.name, t.block_size, t.block_bytes) for t in BLOCK_TYPES.values()}
_TYPES = _PLAIN_TYPES | _OTHER_QUANTIZED_TYPES | _GUARDED_TYPES
_PLAIN_NAMES = {name for name, _, _ in _PLAIN_TYPES.values()}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# struct codes of the metadata's scalar types; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: Its name.
        type_name: ggml's name of its type.
        shape: ``(..., rows, columns)``, the columns being ggml's first dimension.
        begin: Offset of its first byte in the file.
        num_bytes: Its size.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype where it is in full precision."""
        return _FLOATS.get(self.type_name)

    @property
    def is_quantized(self) -> bool:
        return self.type_name not in _PLAIN_NAMES

    @property
    def num_weights(self) -> int:
        return int(np.prod(self.shape, dtype=object))


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, opened.

    Attributes:
        path: The file.
        version: Version of the format.
        metadata: Scalar and string metadata by key; arrays are left out.
        tensors: Tensors by name, in the file's order.
        alignment: Alignment of the tensors' bytes.
        num_metadata: Number of metadata entries, arrays included.
        metadata_end: Offset after the metadata, where the list of tensors starts.
        tensors_end: Offset after the list of tensors.
        data_begin: Offset of the first tensor's bytes.
        spans: Where each metadata entry lies in the file, from its key to its last byte.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    alignment: int
    num_metadata: int
    metadata_end: int
    tensors_end: int
    data_begin: int
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def read_bytes(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The raw bytes of a tensor, mapped from the file and not yet read."""
        tensor = self.tensors[name]
        return np.memmap(self.path, np.uint8, "r", tensor.begin, (tensor.num_bytes,))

    def read(self, name: str) -> Tensor:
        """A full-precision tensor in its own dtype, mapped from the file; what is written into it stays in memory."""
        tensor = self.tensors[name]
        assert tensor.dtype is not None, "only full-precision tensors are read as numbers"
        data = torch.from_numpy(np.memmap(self.path, np.uint8, "c", tensor.begin, (tensor.num_bytes,)))
        return data.view(tensor.dtype).view(tensor.shape)


class _Cursor:
    """Reads a header front to back and never past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path.name} is cut short: it ends inside {what}", remedy="Download or convert the file again."
            )
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def unpack(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        return self.take(self.unpack("Q", what), what).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A metadata value; ``None`` for an array, which is stepped over."""
        if kind == _STRING:
            return self.string(key)
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind], key)
        if kind != _ARRAY or depth >= _MAX_ARRAY_DEPTH:
            raise CheckpointError(f"{self.path.name}: metadata {key!r} has the unknown type {kind}")
        element, count = self.unpack("I", key), self.unpack("Q", key)
        if element in _SCALARS:
            self.take(struct.calcsize("<" + _SCALARS[element]) * count, key)
        else:
            for _ in range(count):
                self.value(element, key, depth + 1)
        return None


def open_gguf(path: Path | str) -> GgufFile:
    """Open a GGUF file and check its header against its size.

    Raises:
        CheckpointError: It is missing, no GGUF file, big-endian, cut short or malformed; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", remedy="Give the path of a GGUF file.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, path))
    except ValueError as error:  # mmap refuses an empty file
        raise CheckpointError(f"{path.name} is empty or malformed: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse(cursor: _Cursor) -> GgufFile:
    path = cursor.path
    if cursor.take(4, "its magic number") != MAGIC:
        raise CheckpointError(f"{path.name} is no GGUF file: it does not start with 'GGUF'")
    version = cursor.unpack("I", "its version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _VERSIONS:
            raise CheckpointError(
                f"{path.name} is a big-endian GGUF file",
                remedy="Convert the model again without --bigendian, or swap it with gguf-convert-endian.",
            )
        raise CheckpointError(f"{path.name} has GGUF version {version}; versions 2 and 3 can be read")
    num_tensors = cursor.unpack("Q", "its number of tensors")
    num_metadata = cursor.unpack("Q", "its number of metadata entries")
    metadata: dict[str, Any] = {}
    spans = {}
    for _ in range(num_metadata):
        start = cursor.at
        key = cursor.string("a metadata key")
        if key in spans:
            raise CheckpointError(f"{path.name}: metadata {key!r} appears twice")
        value = cursor.value(cursor.unpack("I", key), key)
        spans[key] = (start, cursor.at)
        if value is not None:
            metadata[key] = value
    metadata_end = cursor.at
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise CheckpointError(f"{path.name}: general.alignment is {alignment!r}, not a multiple of 8")
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    data_begin = -(-cursor.at // alignment) * alignment
    tensors = _placed(infos, data_begin, alignment, path, len(cursor.data))
    return GgufFile(
        path, version, metadata, tensors, alignment, num_metadata, metadata_end, cursor.at, data_begin, spans
    )


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("the name of a tensor")
    num_dims = cursor.unpack("I", name)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise CheckpointError(f"{cursor.path.name}: {name} has {num_dims} dimensions")
    shape = tuple(cursor.unpack("Q", name) for _ in range(num_dims))[::-1]
    return name, shape, cursor.unpack("I", name), cursor.unpack("Q", name)


def _placed(
    infos: list[tuple[str, tuple[int, ...], int, int]], data_begin: int, alignment: int, path: Path, file_size: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in infos:
        if number not in _TYPES:
            raise CheckpointError(
                f"{path.name}: {name} has the unknown type {number}", remedy="A newer llama.cpp may have written it."
            )
        type_name, block_size, block_bytes = _TYPES[number]
        if name in tensors:
            raise CheckpointError(f"{path.name}: {name} appears twice")
        if shape[-1] % block_size or min(shape) < 1:
            raise CheckpointError(f"{path.name}: {name} of shape {shape} cannot be stored as {type_name}")
        num_bytes = int(np.prod(shape, dtype=object)) // block_size * block_bytes
        if offset % alignment:
            raise CheckpointError(f"{path.name}: {name} lies at offset {offset}, which is not aligned to {alignment}")
        if data_begin + offset + num_bytes > file_size:
            missing = data_begin + offset + num_bytes - file_size
            raise CheckpointError(
                f"{path.name} is cut short: {missing} bytes of {name} are missing",
                remedy="Download or convert the file again.",
            )
        tensors[name] = GgufTensor(name, type_name, shape, data_begin + offset, num_bytes)
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.begin)
    for before, after in itertools.pairwise(ordered):
        if before.begin + before.num_bytes > after.begin:
            raise CheckpointError(f"{path.name}: {before.name} and {after.name} overlap")
    return tensors
