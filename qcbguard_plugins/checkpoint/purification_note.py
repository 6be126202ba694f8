"""What a folder says of a purification, for the manifest of a guard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from qcbguard_plugins.checkpoint.manifest import FileRecord, PurificationNote
from qcbguard_plugins.errors import CheckpointError

PURIFICATION_FILE = "qcbguard-purify.json"


@contextmanager
def purification_errors(folder: Path) -> Iterator[None]:
    """Say what is wrong with the manifest of a purified folder.

    Raises:
        CheckpointError: It cannot be read, or does not follow the schema.
    """
    try:
        yield
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{PURIFICATION_FILE} of {folder.name} is not a valid manifest",
            remedy="Delete it to guard the folder as one that was never purified.",
        ) from error


class _Purified(BaseModel):
    """What a guard needs of the manifest of a purification; the rest of it is the purification's own."""

    created: str
    files: tuple[FileRecord, ...]


def note_purification(folder: Path, files: Sequence[FileRecord]) -> PurificationNote | None:
    """What a guard shall say of a folder's purification.

    Args:
        folder: The folder that was guarded.
        files: Its weight files, as the guard found them.

    Raises:
        CheckpointError: Its manifest does not follow the schema.
    """
    path = folder / PURIFICATION_FILE
    if not path.is_file():
        return None
    with purification_errors(folder):
        report = _Purified.model_validate_json(path.read_bytes())
    found = {file.name: file.sha256_in for file in files}
    same = all(found.get(file.name) == file.sha256_out for file in report.files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return PurificationNote(created=report.created, manifest_sha256=digest, weights_as_purified=same)
