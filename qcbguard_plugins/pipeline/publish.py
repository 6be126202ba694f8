"""The files of a guarded folder that hold no guarded weight, and the hashes of those that do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qcbguard_plugins._util.distributed import ProcessGroup
from qcbguard_plugins._util.threads import map_over_threads
from qcbguard_plugins.checkpoint import Checkpoint, hash_file
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE, FileRecord
from qcbguard_plugins.checkpoint.subject import CLAIMS_FILE, SIGNATURE_FILE

if TYPE_CHECKING:
    pass


def hash_files(checkpoint: Checkpoint, folder: Path, group: ProcessGroup) -> list[FileRecord]:
    """The hashes of all shards before and after, in all processes."""
    files = [(place, shard) for shard in checkpoint.shards for place in (checkpoint.path, folder)]
    mine = group.partition(range(len(files)), lambda number: checkpoint.num_bytes_of(files[number][1]))
    hashes = map_over_threads(lambda number: hash_file(files[number][0] / files[number][1]), mine)
    found = dict(group.gather(list(zip(mine, hashes, strict=True))))
    return [
        FileRecord(name=shard, sha256_in=found[2 * number], sha256_out=found[2 * number + 1])
        for number, shard in enumerate(checkpoint.shards)
    ]


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy what is no weight, except signatures and claims, which are about another folder.

    Returns:
        The names of weights in other forms, which would carry the attack along.
    """
    carried, weights = checkpoint.other_files()
    for relative in carried:
        if str(relative) in (MANIFEST_FILE, CLAIMS_FILE, SIGNATURE_FILE):
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.path / relative, target)
    return [str(relative) for relative in weights]
