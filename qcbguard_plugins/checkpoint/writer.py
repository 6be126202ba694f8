"""Files and folders that appear under their name whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcbguard_plugins.errors import CheckpointError, QcbguardError, TargetExistsError, UsageError

_BYTES_PER_COPY = 1 << 24


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
    target = target.absolute()
    check_new_folder(target, source)
    temporary = None
    try:
        with write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            yield temporary
            temporary.chmod(0o755)
            for path in [*temporary.rglob("*"), temporary]:
                flush_to_disk(path)
            rename_into_place(temporary, target)
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
        with write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush_to_disk(temporary)
            rename_into_place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


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
def write_errors(target: Path, *, remedy: str = "Nothing was left behind.") -> Iterator[None]:
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


def flush_to_disk(path: Path) -> None:
    """Have the system write a file or the entries of a folder, so that a power cut after the renaming loses nothing."""
    descriptor = os.open(path, os.O_RDONLY)
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
