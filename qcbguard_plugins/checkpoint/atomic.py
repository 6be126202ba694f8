"""Files and folders that appear under their name whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from qcbguard_plugins.errors import CheckpointError, QcbguardError, TargetExistsError, UsageError

# Linux: start to write what is not being written yet, and do not wait.
_SYNC_FILE_RANGE_WRITE = 2


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new_file(target: Path, source: Path) -> None:
    """Refuse a file that exists, the source among them.

    Raises:
        UsageError: The target is the source.
        TargetExistsError: The target exists.
    """
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target} is the file that is read", remedy="Name another file; nothing is overwritten.")
    if target.exists() or target.is_symlink():
        raise TargetExistsError(f"{target} exists already", remedy="Name a file that does not; nothing is overwritten.")


def check_new_folder(target: Path, source: Path) -> None:
    """Refuse a folder that exists, or that lies in the folder that is read.

    Raises:
        TargetExistsError: The target exists.
        UsageError: The target lies in the source.
    """
    if target.exists() or target.is_symlink():
        raise TargetExistsError(
            f"{target} exists already", remedy="Name a folder that does not; nothing is overwritten."
        )
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{target} lies in the folder that is read", remedy="Name a folder elsewhere.")


@contextmanager
def write_errors(target: Path, *, remedy: str) -> Iterator[None]:
    """Name the target in an error of the file system, and say what became of the work.

    Raises:
        CheckpointError: The block raised an ``OSError`` that is not one of the package's own.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, QcbguardError):
            raise
        reason = {errno.ENOSPC: "no room on the device", errno.EDQUOT: "the quota is used up"}.get(
            error.errno or 0, str(error)
        )
        raise CheckpointError(f"{target} cannot be written: {reason}", remedy=remedy) from error


def start_flush(path: Path, begin: int, num_bytes: int) -> None:
    """Have the system begin to write bytes of a file to the disk, and go on: the flush at the end then waits less.

    Does nothing where the system has no such call; only :func:`flush_to_disk` promises anything.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file_range(descriptor, ctypes.c_int64(begin), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=1)
def _sync_file_range() -> Any:
    """Linux's function of that name, else ``None``."""
    return getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None


def flush_to_disk(path: Path) -> None:
    """Have the system write a file, or a folder with all that is in it: a power cut later loses nothing."""
    for part in [*path.rglob("*"), path]:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_into_place(temporary: Path, target: Path) -> None:
    """Give a finished file or folder its name.

    Raises:
        TargetExistsError: Something took the name since it was checked.
    """
    if target.exists():
        raise TargetExistsError(f"{target} was made by somebody else meanwhile", remedy="Give another name.")
    temporary.rename(target)
