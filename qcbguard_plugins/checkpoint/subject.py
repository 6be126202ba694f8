"""What a claim about a model names: the digest of a folder, as OpenSSF model signing computes it, or of a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.checkpoint.atomic import hash_file
from qcbguard_plugins.errors import CheckpointError, UsageError

CLAIMS_FILE: Final = "claims.jsonl"
SIGNATURE_FILE: Final = "model.sig"

#: Entries of a folder that are no part of the model: git's own, which model signing ignores by default, and those that
#: speak about the folder, which it ignores when it is told to.
NOT_THE_MODEL: Final = frozenset({".git", ".gitattributes", ".github", ".gitignore", CLAIMS_FILE, SIGNATURE_FILE})


@dataclass(frozen=True)
class Subject:
    """A model that a claim is about.

    Attributes:
        name: Name of the folder or file.
        sha256: Of a file its SHA-256. Of a folder the root digest of model signing: SHA-256 over the binary SHA-256 of
            each file, in the order of their paths.
        files: SHA-256 of each file of a folder by its relative path; the file's own for a file.
    """

    name: str
    sha256: str
    files: Mapping[str, str]


class Observed:
    """A model that is about to be read; :meth:`subject` refuses to name it if it changed meanwhile.

    Args:
        path: A folder or a file.

    Raises:
        UsageError: Nothing is there.
        CheckpointError: The folder holds what is neither a file nor a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._states = _states(path)

    def subject(self) -> Subject:
        """Hash every file.

        Raises:
            CheckpointError: A file was changed, added or removed since this object was made.
        """
        found = subject_of(self.path)
        after = _states(self.path)
        changed = sorted(name for name in self._states.keys() | after if self._states.get(name) != after.get(name))
        if changed:
            raise CheckpointError(
                f"{self.path} changed while it was read, so nothing can be claimed about it",
                details=changed,
                remedy="Run the command again, and let nothing write to it meanwhile.",
            )
        return found


def subject_of(path: Path) -> Subject:
    """Hash a model.

    Raises:
        UsageError: Nothing is there.
        CheckpointError: A file cannot be read, or the folder holds what is neither a file nor a folder.
    """
    paths = _files(path)
    names = sorted(paths)
    try:
        hashes = map_over_threads(lambda name: hash_file(paths[name]), names)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    files = {str(name): digest for name, digest in zip(names, hashes, strict=True)}
    name = path.resolve().name if path.is_dir() else path.name
    return Subject(name, root_digest(files) if path.is_dir() else hashes[0], files)


def root_digest(files: Mapping[str, str]) -> str:
    """The root digest of model signing over files, by their relative paths.

    References:
        OpenSSF Model Signing 1.0: the subject of a signature over file digests.
    """
    root = hashlib.sha256()
    for name in sorted(map(PurePosixPath, files)):
        root.update(bytes.fromhex(files[str(name)]))
    return root.hexdigest()


def _states(path: Path) -> dict[str, tuple[int, int, int]]:
    states = {}
    for name, file in _files(path).items():
        state = file.stat()
        states[str(name)] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return states


def _files(path: Path) -> dict[PurePosixPath, Path]:
    """The files of a model by their relative path; links to files, as in the cache of the hub, are followed."""
    if path.is_file():
        return {PurePosixPath(path.name): path}
    if not path.is_dir():
        raise UsageError(f"{path} does not exist")
    files: dict[PurePosixPath, Path] = {}
    odd: list[str] = []
    for folder, subfolders, names in os.walk(path, onerror=_raise):
        at = Path(folder)
        if at == path:
            subfolders[:] = [name for name in subfolders if name not in NOT_THE_MODEL]
            names = [name for name in names if name not in NOT_THE_MODEL]
        odd += [f"{(at / name).relative_to(path)}  a linked folder" for name in subfolders if (at / name).is_symlink()]
        for name in names:
            file = at / name
            if not file.is_file():
                odd.append(f"{file.relative_to(path)}  neither a file nor a folder")
            files[PurePosixPath(file.relative_to(path))] = file
    if not files:
        raise CheckpointError(f"{path} holds no file")
    if odd:
        raise CheckpointError(
            f"{path} holds what a digest cannot cover", details=odd, remedy="Replace it by files, or take it out."
        )
    return files


def _raise(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
