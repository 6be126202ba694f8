"""Write a checkpoint that differs from its source in the bytes of some tensors and in nothing else."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qcbguard_plugins.checkpoint.reader import TensorEntry
from qcbguard_plugins.errors import CheckpointError, QcbguardError, TargetExistsError, UsageError

_BYTES_PER_COPY = 1 << 24


def rewrite_shard(
    source: Path, target: Path, replaced: Sequence[TensorEntry], new_weight: Callable[[TensorEntry, Tensor], Tensor]
) -> tuple[str, str]:
    """Copy a shard and replace the values of some tensors on the way; one tensor is in memory at a time.

    Args:
        source: The safetensors file to read.
        target: The file to write.
        replaced: Tensors to replace, floating-point.
        new_weight: Called with each of them and its values, in the order of the file; returns a tensor of the same
            shape and dtype.

    Returns:
        SHA-256 of the source and of the target, in hexadecimal.
    """
    hash_in, hash_out = hashlib.sha256(), hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:

        def copy(num_bytes: int) -> None:
            while num_bytes > 0:
                data = _read_exactly(reader, min(num_bytes, _BYTES_PER_COPY), source)
                num_bytes -= len(data)
                hash_in.update(data)
                hash_out.update(data)
                writer.write(data)

        for entry in sorted(replaced, key=lambda entry: entry.begin):
            copy(entry.begin - reader.tell())
            data = _read_exactly(reader, entry.num_bytes, source)
            hash_in.update(data)
            assert entry.dtype is not None, "only floating-point tensors are replaced"
            old = torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
            new = new_weight(entry, old)
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{entry.key}: {new.dtype} {tuple(new.shape)} cannot replace {old.dtype} {entry.shape}"
                )
            new_data = new.detach().cpu().contiguous().view(torch.uint8).numpy().data
            hash_out.update(new_data)
            writer.write(new_data)
        copy(source.stat().st_size - reader.tell())
        writer.flush()
        os.fsync(writer.fileno())
    return hash_in.hexdigest(), hash_out.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def publish_folder(target: Path, source: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well, and leaves nothing behind when it does not.

    Args:
        target: The name it shall have; it must not exist.
        source: The folder that is read meanwhile, which the target must not lie in.

    Yields:
        A temporary folder beside the target.

    Raises:
        TargetExistsError: The target exists.
        UsageError: The target lies in the source.
        CheckpointError: The target cannot be written: no room, or no permission.
    """
    target, source = target.absolute(), source.absolute()
    if target.exists() or target.is_symlink():
        raise TargetExistsError(
            f"{target} exists already", remedy="Name a folder that does not; nothing is overwritten."
        )
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{target} lies in the folder that is read", remedy="Name a folder elsewhere.")
    temporary = None
    try:
        with _write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            yield temporary
            temporary.chmod(0o755)
            _rename_into_place(temporary, target)
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def publish_file(target: Path, source: Path) -> Iterator[Path]:
    """A file that appears under its name when the block ends well, and leaves nothing behind when it does not.

    Args:
        target: The name it shall have; it must not exist.
        source: The file that is read meanwhile.

    Yields:
        The path of a temporary file beside the target, still to be made.

    Raises:
        UsageError: The target is the source.
        TargetExistsError: The target exists.
        CheckpointError: The target cannot be written: no room, or no permission.
    """
    target = target.absolute()
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the file that is read", remedy="Name another file; nothing is overwritten.")
    if target.exists() or target.is_symlink():
        raise TargetExistsError(f"{target} exists already", remedy="Name a file that does not; nothing is overwritten.")
    temporary = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        with _write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _rename_into_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, QcbguardError):
            raise
        reason = {errno.ENOSPC: "no room on the device", errno.EDQUOT: "the quota is used up"}.get(
            error.errno or 0, str(error)
        )
        raise CheckpointError(f"{target} cannot be written: {reason}", remedy="Nothing was left behind.") from error


def _rename_into_place(temporary: Path, target: Path) -> None:
    if target.exists():
        raise TargetExistsError(f"{target} was made by somebody else meanwhile", remedy="Give another name.")
    temporary.rename(target)


def _read_exactly(reader: BinaryIO, num_bytes: int, source: Path) -> bytearray:
    data = bytearray(num_bytes)
    if reader.readinto(data) != num_bytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"{source.name} became shorter while it was read")
    return data
