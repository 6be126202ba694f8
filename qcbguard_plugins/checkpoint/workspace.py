"""A guarded folder in the making: it survives an interruption, and appears under its name whole or not at all.

Beside the target ``NAME`` lies ``.NAME.partial`` with the folder itself, a journal of the tensors that are done, and
what the run was asked for. A second run with the same request takes over the tensors whose source and guarded bytes are
still those of the journal, and writes everything else again. Nothing is trusted because it is there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import filelock
import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from qcbguard_plugins.checkpoint.reader import Checkpoint, TensorEntry
from qcbguard_plugins.checkpoint.writer import check_new_folder, flush_to_disk, rename_into_place, write_errors
from qcbguard_plugins.errors import CheckpointError, QcbguardError, TargetExistsError, TeamError, UsageError
from qcbguard_plugins.report.model import Record, TensorRecord
from qcbguard_plugins.team import ALONE, Team

_FOLDER: Final = "folder"
_REQUEST_FILE: Final = "request.json"
_LOCK_FILE: Final = "lock"
_BYTES_PER_COPY: Final = 1 << 24


class Done(Record):
    """A line of the journal: one tensor that was guarded.

    Attributes:
        key: Its name in the checkpoint.
        source: XXH3 hash of its bytes in the source.
        guarded: XXH3 hash of its bytes in the guarded folder.
        record: What the report will say of it.
    """

    key: str
    source: str
    guarded: str
    record: TensorRecord


class Workspace:
    """The folder in the making, as one of the processes that fill it sees it.

    Attributes:
        folder: The folder that will be published.
    """

    def __init__(self, partial: Path, checkpoint: Checkpoint, rank: int) -> None:
        self.folder = partial / _FOLDER
        self._partial = partial
        self._checkpoint = checkpoint
        self._done = _read_journals(partial)
        self._journal_path = partial / f"journal-{rank}.jsonl"

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that a run makes up once and keeps when it is resumed, such as a seed."""
        path = self._partial / f"{name}.json"
        if not path.exists():
            _write_whole(path, json.dumps(make()))
        return json.loads(path.read_text(encoding="utf-8"))

    def kept_folder(self, name: str) -> Path:
        """A folder for what a run keeps until its target is published, and finds again when it is resumed."""
        folder = self._partial / name
        folder.mkdir(exist_ok=True)
        return folder

    def copy_rest(self, shards: Sequence[str], replaced: Sequence[TensorEntry]) -> None:
        """Copy all bytes of some shards but those of the tensors that will be replaced."""
        for shard in shards:
            inside = sorted((entry for entry in replaced if entry.shard == shard), key=lambda entry: entry.begin)
            source, target = self._checkpoint.path / shard, self.folder / shard
            size = self._checkpoint.num_bytes_of(shard)
            starts, ends = [0, *(entry.end for entry in inside)], [*(entry.begin for entry in inside), size]
            target.touch()
            with source.open("rb") as reader, target.open("r+b") as writer:
                writer.truncate(size)
                for start, end in zip(starts, ends, strict=True):
                    reader.seek(start)
                    writer.seek(start)
                    while (left := end - reader.tell()) > 0:
                        data = reader.read(min(_BYTES_PER_COPY, left))
                        if not data:
                            raise _shorter(source)
                        writer.write(data)

    def read(self, entry: TensorEntry) -> tuple[Tensor, str]:
        """A tensor of the source, and the hash of its bytes."""
        assert entry.dtype is not None, "only floating-point tensors are replaced"
        data = _read_span(self._checkpoint.path / entry.shard, entry)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape), _hash(data)

    def resumed(self, entry: TensorEntry, source: str) -> TensorRecord | None:
        """The record of a tensor that an interrupted run guarded.

        Args:
            entry: The tensor of the source.
            source: Hash of its bytes.

        Returns:
            ``None`` unless the journal has it and the source and guarded bytes are still those of the journal.
        """
        done = self._done.get(entry.key)
        if done is None or done.source != source:
            return None
        is_there = _hash(_read_span(self.folder / entry.shard, entry)) == done.guarded
        return done.record if is_there else None

    def write(self, entry: TensorEntry, source: str, weight: Tensor, record: TensorRecord) -> None:
        """Put a guarded tensor in its place, and then into the journal.

        Args:
            entry: The tensor that it replaces.
            source: Hash of that tensor's bytes.
            weight: Of the same shape and dtype.
            record: What the report will say of it.
        """
        if tuple(weight.shape) != entry.shape or weight.dtype != entry.dtype:
            raise ValueError(f"{weight.dtype} {tuple(weight.shape)} cannot replace {entry}")
        data = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        with (self.folder / entry.shard).open("r+b") as writer:
            writer.seek(entry.begin)
            writer.write(data)
        done = Done(key=entry.key, source=source, guarded=_hash(data), record=record)
        with self._journal_path.open("a", encoding="utf-8") as journal:
            journal.write(f"{done.model_dump_json()}\n")


@contextmanager
def resumable_folder(
    target: Path, checkpoint: Checkpoint, request: Mapping[str, Any], team: Team = ALONE
) -> Iterator[Workspace]:
    """A folder that appears under its name when the block ends well, and is kept beside it when it is interrupted.

    Args:
        target: The name it shall have; it must not exist.
        checkpoint: The folder that is read meanwhile, which the target must not lie in.
        request: What the run is asked for, as JSON values. Only a run with the same request goes on with its work.
        team: The processes that fill it; the first of them makes and publishes it.

    Yields:
        The folder in the making. An error of the package's own removes it: the same request would meet it again.

    Raises:
        TargetExistsError: The target exists, or another run is making it.
        UsageError: The target lies in the source, or a run with another request was interrupted.
        CheckpointError: The target cannot be written, or the source changed while it was read.
    """
    target = target.absolute()
    partial = partial_of(target)
    if team.rank > 0:
        team.wait()
        yield Workspace(partial, checkpoint, team.rank)
        team.wait()
        return
    check_new_folder(target, checkpoint.path)
    go_on = f"Run the same command again to go on where it stopped, or delete {partial} to give up."
    with write_errors(target, remedy=go_on):
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, target):
            before = _state_of(checkpoint)
            _compare_request(partial, {**request, "source": before})
            (partial / _FOLDER).mkdir(exist_ok=True)
            team.wait()
            try:
                yield Workspace(partial, checkpoint, team.rank)
                if _state_of(checkpoint) != before:
                    raise CheckpointError(
                        f"{checkpoint.path} changed while it was read",
                        remedy="Nothing was written. Guard it again when nobody writes to it.",
                    )
                for path in [*(partial / _FOLDER).rglob("*"), partial / _FOLDER]:
                    flush_to_disk(path)
                rename_into_place(partial / _FOLDER, target)
            except TeamError:
                raise
            except QcbguardError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(partial, ignore_errors=True)
    team.wait()


def partial_of(target: Path) -> Path:
    """Where the folder in the making lies."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    lock = filelock.FileLock(partial / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise TargetExistsError(
            f"another run is making {target}", remedy="Wait for its end, or give another name."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _compare_request(partial: Path, request: Mapping[str, Any]) -> None:
    """Keep the request of a new run; refuse one that differs from that of the interrupted run."""
    path = partial / _REQUEST_FILE
    request = json.loads(json.dumps(request))
    if not path.exists():
        _write_whole(path, json.dumps(request, indent=1))
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(name for name in kept.keys() | request.keys() if kept.get(name) != request.get(name))
    if differing:
        raise UsageError(
            f"an interrupted run left its work in {partial}, and this one differs in {', '.join(differing)}",
            details=[f"{name}  then {kept.get(name)}, now {request.get(name)}" for name in differing],
            remedy=f"Ask for the same to go on with it, or delete {partial} to begin anew.",
        )


def _state_of(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size in bytes and time of change in nanoseconds of every shard."""
    states = {shard: (checkpoint.path / shard).stat() for shard in checkpoint.shards}
    return {shard: [state.st_size, state.st_mtime_ns] for shard, state in states.items()}


def _read_journals(partial: Path) -> dict[str, Done]:
    """The journals of all processes; a line that the interruption cut short is no line."""
    done = {}
    for path in sorted(partial.glob("journal-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValidationError):
                entry = Done.model_validate_json(line)
                done[entry.key] = entry
    return done


def _read_span(path: Path, entry: TensorEntry) -> bytearray:
    data = bytearray(entry.num_bytes)
    with path.open("rb", buffering=0) as reader:
        reader.seek(entry.begin)
        view = memoryview(data)
        while view:
            num_read = reader.readinto(view)
            if not num_read:
                raise _shorter(path)
            view = view[num_read:]
    return data


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name} became shorter while it was read")


def _hash(data: bytearray | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
