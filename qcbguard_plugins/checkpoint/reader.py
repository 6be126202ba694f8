"""Find out what a checkpoint folder holds, from its headers alone.

Errors, never warnings: a missing or malformed file, an index that disagrees with its shards, and all that
:mod:`~qcbguard_plugins.checkpoint.loaded_files` refuses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcbguard_plugins.checkpoint.loaded_files import INDEX_FILE, WEIGHT_SUFFIXES, loaded_files
from qcbguard_plugins.errors import CheckpointError

# The format's own limit on a header.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard.

    Attributes:
        key: Its name in the checkpoint.
        shard: File name of its shard.
        dtype: Its dtype, or ``None`` for one that is not a floating-point number of 16 to 64 bits.
        shape: Its shape.
        begin: Offset of its first byte in the shard file.
        end: Offset after its last byte.
    """

    key: str
    shard: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened.

    Attributes:
        path: The folder.
        config: Its ``config.json``.
        shards: File names of the shards, sorted.
        tensors: All tensors by name, ordered by shard and by place in it.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    tensors: dict[str, TensorEntry]

    def read(self, key: str) -> Tensor:
        """Read one tensor into memory."""
        entry = self.tensors[key]
        try:
            with safe_open(self.path / entry.shard, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{entry.shard}: {key} cannot be read: {error}") from error

    def num_bytes_of(self, shard: str) -> int:
        """Size of a shard in bytes, by its header: the format allows nothing behind the last tensor."""
        return max((entry.end for entry in self.tensors.values() if entry.shard == shard), default=0)

    def other_files(self) -> tuple[list[Path], list[Path]]:
        """The folder's files besides the shards, relative to it.

        Returns:
            Those that a copy of the folder should carry, and those that hold weights in another form.
        """
        carried: list[Path] = []
        weights: list[Path] = []
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if not file.is_file() or ".cache" in relative.parts or ".git" in relative.parts:
                continue
            if relative.name in self.shards and relative.parent == Path():
                continue
            (weights if file.suffix.lower() in WEIGHT_SUFFIXES else carried).append(relative)
        return carried, weights


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a folder with a safetensors checkpoint.

    Raises:
        CheckpointError: The folder cannot be read as one; the message says why and what to do.
    """
    path = Path(path)
    files = loaded_files(path)
    return open_files(path, files.config, files.shards, files.shard_of)


def open_files(
    path: Path, config: dict[str, Any], shards: tuple[str, ...], shard_of: dict[str, str] | None = None
) -> Checkpoint:
    """Open named safetensors files of a folder.

    Args:
        path: The folder.
        config: Its configuration.
        shards: File names.
        shard_of: Where the index has each tensor, to be compared with where it is.

    Raises:
        CheckpointError: A file is malformed, or the index disagrees with its shards.
    """
    entries = [entry for shard in shards for entry in read_header(path / shard)]
    _compare_with_index(shard_of, entries)
    return Checkpoint(path, config, shards, {entry.key: entry for entry in entries})


def read_header(shard: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in the order of their bytes.

    The library checks the whole file first: offsets that overlap, leave holes or run past the end never get here.
    """
    try:
        with safe_open(shard, framework="pt"):
            pass
        with shard.open("rb") as file:
            num_header_bytes = int.from_bytes(file.read(8), "little")
            if num_header_bytes > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{shard.name}: a header of {num_header_bytes} bytes is too large")
            header = json.loads(file.read(num_header_bytes))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{shard.name} is not a readable safetensors file: {error}") from error
    data = 8 + num_header_bytes
    entries = [
        TensorEntry(
            key,
            shard.name,
            _DTYPES.get(info["dtype"]),
            tuple(info["shape"]),
            data + info["data_offsets"][0],
            data + info["data_offsets"][1],
        )
        for key, info in header.items()
        if key != "__metadata__"
    ]
    return sorted(entries, key=lambda entry: entry.begin)


def _compare_with_index(shard_of: dict[str, str] | None, entries: list[TensorEntry]) -> None:
    found: dict[str, str] = {}
    problems = []
    for entry in entries:
        if entry.key in found:
            problems.append(f"{entry.key}  stored twice, in {found[entry.key]} and {entry.shard}")
        elif shard_of is not None and entry.key not in shard_of:
            problems.append(f"{entry.key}  stored in {entry.shard} and not listed")
        elif shard_of is not None and shard_of[entry.key] != entry.shard:
            problems.append(f"{entry.key}  listed in {shard_of[entry.key]} and stored in {entry.shard}")
        found[entry.key] = entry.shard
    problems += [
        f"{key}  listed in {shard} and not stored there" for key, shard in (shard_of or {}).items() if key not in found
    ]
    if problems:
        raise CheckpointError(f"{INDEX_FILE} disagrees with its shards about {len(problems)} tensors", details=problems)
