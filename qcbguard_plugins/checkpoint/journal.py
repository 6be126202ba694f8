"""Work that survives an interruption, and appears under its name whole or not at all.

Beside the target ``NAME`` lies ``.NAME.partial`` with the work itself, a journal of the tensors that are done, and what
the run was asked for. A second run with the same request takes over the tensors whose source and guarded bytes are
still those of the journal, and writes everything else again. Nothing is trusted because it is there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import filelock
import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from qcbguard_plugins._util.records import Record
from qcbguard_plugins.checkpoint.atomic import flush_to_disk, rename_into_place, start_flush, write_errors
from qcbguard_plugins.checkpoint.manifest import TensorRecord
from qcbguard_plugins.errors import CheckpointError, ProcessGroupError, QcbguardError, TargetExistsError, UsageError

_REQUEST_FILE: Final = "request.json"
_LOCK_FILE: Final = "lock"
_BYTES_PER_COPY: Final = 1 << 20
_BYTES_PER_HASH: Final = 1 << 20


class Done(Record):
    """A line of the journal: one tensor that was guarded.

    Attributes:
        key: Its name in the checkpoint.
        source: XXH3 hash of its bytes in the source.
        guarded: XXH3 hash of its bytes in the work.
        record: What the report will say of it.
    """

    key: str
    source: str
    guarded: str
    record: TensorRecord


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in the work.

    Attributes:
        key: Its name in the journal.
        dtype: Its dtype.
        shape: Its shape.
        path: The file.
        begin: Offset of its first byte.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    begin: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class KeptWork:
    """What a run has done, as one of the processes that do it sees it."""

    def __init__(self, partial: Path, rank: int = 0) -> None:
        self._partial = partial
        self._done = _read_journals(partial)
        self._journal_path = partial / f"journal-{rank}.jsonl"

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that a run makes up once and keeps when it is resumed, such as a seed.

        Raises:
            CheckpointError: What was kept is damaged.
        """
        path = self._partial / f"{name}.json"
        if not path.exists():
            _write_whole(path, json.dumps(make()))
        return _read_kept(path)

    def resumed(self, span: Span, source: Callable[[], str]) -> TensorRecord | None:
        """The record of a tensor that an interrupted run guarded.

        Args:
            span: Where it lies.
            source: Gives the hash of its bytes in the source; called only for a tensor in the journal.

        Returns:
            ``None`` unless the journal has it and the source and guarded bytes are still those of the journal.
        """
        done = self._done.get(span.key)
        if done is None or done.source != source():
            return None
        is_there = hash_span(span.path, span.begin, span.num_bytes) == done.guarded
        return done.record if is_there else None

    def write(self, span: Span, source: str, weight: Tensor, record: TensorRecord) -> None:
        """Put a guarded tensor in its place, and then into the journal; see :meth:`put` and :meth:`finish`."""
        self.finish(span, source, self.put(span, weight), record)

    def put(self, span: Span, weight: Tensor) -> str:
        """Put a tensor in its place; return the hash of its bytes."""
        if tuple(weight.shape) != span.shape or weight.dtype != span.dtype:
            raise ValueError(f"{weight.dtype} {tuple(weight.shape)} cannot replace {span}")
        data = bytes_of(weight)
        write_span(span.path, span.begin, data)
        return hash_bytes(data)

    def finish(self, span: Span, source: str, guarded: str, record: TensorRecord) -> None:
        """Put a tensor that is in its place into the journal.

        Args:
            span: Where it lies.
            source: Hash of the bytes in the source.
            guarded: Hash of the bytes in its place.
            record: What the report will say of it.
        """
        start_flush(span.path, span.begin, span.num_bytes)
        done = Done(key=span.key, source=source, guarded=guarded, record=record)
        with self._journal_path.open("a", encoding="utf-8") as journal:
            journal.write(f"{done.model_dump_json()}\n")


@contextmanager
def resumable(
    target: Path,
    content: str,
    request: Mapping[str, Any],
    state: Callable[[], Any],
    source: Path,
    *,
    wait: bool = False,
) -> Iterator[Path]:
    """A file or folder that appears under its name when the block ends well, and is kept when it is interrupted.

    Args:
        target: The name it shall have; the caller has checked that it does not exist.
        content: Name of the file or folder in the making.
        request: What the run is asked for, as JSON values. Only a run with the same request goes on with its work.
        state: What the source is recognized by, as JSON values; it must be the same when the block ends.
        source: What is read meanwhile, for a message.
        wait: Wait for another run that makes the same target, and do not refuse.

    Yields:
        The folder in which to make the content. An error of the package's own removes it: the same request would meet
        it again.

    Raises:
        TargetExistsError: The target exists, or another run is making it.
        UsageError: A run with another request was interrupted.
        CheckpointError: The target cannot be written, the source changed, or what was kept is damaged.
    """
    partial = partial_of(target)
    go_on = f"Run the same command again to go on where it stopped, or delete {partial} to give up."
    with write_errors(target, remedy=go_on), _locked(partial, target, wait=wait):
        if target.exists():
            shutil.rmtree(partial, ignore_errors=True)
            raise TargetExistsError(f"{target} was made by another run meanwhile", remedy="Give another name.")
        before = state()
        _compare_request(partial, {**request, "source": before})
        try:
            yield partial
            if state() != before:
                raise CheckpointError(
                    f"{source} changed while it was read",
                    remedy="Nothing was written. Guard it again when nobody writes to it.",
                )
            flush_to_disk(partial / content)
            rename_into_place(partial / content, target)
        except ProcessGroupError:
            raise
        except QcbguardError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """Where the work in the making lies."""
    return target.with_name(f".{target.name}.partial")


def state_of(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds of a file."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def read_span(path: Path, begin: int, num_bytes: int) -> bytearray:
    """Some bytes of a file.

    Raises:
        CheckpointError: The file ends before.
    """
    data = bytearray(num_bytes)
    read_into(path, begin, memoryview(data))
    return data


def read_into(path: Path, begin: int, view: memoryview) -> None:
    """Fill memory with bytes of a file.

    Raises:
        CheckpointError: The file ends before.
    """
    with path.open("rb", buffering=0) as reader:
        reader.seek(begin)
        while view:
            num_read = reader.readinto(view)
            if not num_read:
                raise _shorter(path)
            view = view[num_read:]


def write_span(path: Path, begin: int, data: memoryview) -> None:
    """Write bytes into a file that is there."""
    with path.open("r+b", buffering=0) as writer:
        writer.seek(begin)
        while data:
            data = data[writer.write(data) :]


def hash_span(path: Path, begin: int, num_bytes: int) -> str:
    """XXH3 hash of some bytes of a file, in hexadecimal, with little of them in memory.

    Raises:
        CheckpointError: The file ends before.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_BYTES_PER_HASH, num_bytes)))
    for start in range(0, num_bytes, _BYTES_PER_HASH):
        part = buffer[: num_bytes - start]
        read_into(path, begin + start, part)
        digest.update(part)
    return digest.hexdigest()


def copy_span(reader: BinaryIO, writer: BinaryIO, num_bytes: int, source: Path) -> None:
    """Copy bytes from where one file stands to where the other does.

    Raises:
        CheckpointError: The source ends before.
    """
    while num_bytes > 0:
        data = reader.read(min(_BYTES_PER_COPY, num_bytes))
        if not data:
            raise _shorter(source)
        num_bytes -= len(data)
        writer.write(data)


def bytes_of(weight: Tensor) -> memoryview:
    """The bytes of a tensor, in the order in which files keep them."""
    data: memoryview = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def hash_bytes(data: bytearray | memoryview) -> str:
    """XXH3 hash, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


@contextmanager
def _locked(partial: Path, target: Path, *, wait: bool) -> Iterator[None]:
    lock = filelock.FileLock(partial / _LOCK_FILE)
    while not lock.is_locked:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except FileNotFoundError:
            continue  # the other run ended, and took its folder along
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
    kept = _read_kept(path)
    if not isinstance(kept, dict):
        raise _damaged(path)
    differing = sorted(name for name in kept.keys() | request.keys() if kept.get(name) != request.get(name))
    if differing:
        raise UsageError(
            f"an interrupted run left its work in {partial}, and this one differs in {', '.join(differing)}",
            details=[f"{name}  then {kept.get(name)}, now {request.get(name)}" for name in differing],
            remedy=f"Ask for the same to go on with it, or delete {partial} to begin anew.",
        )


def _read_kept(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, so the interrupted run cannot be resumed", remedy=f"Delete {path.parent} to begin anew."
    )


def _read_journals(partial: Path) -> dict[str, Done]:
    """The journals of all processes; a line that the interruption cut short is no line."""
    done = {}
    for path in sorted(partial.glob("journal-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValidationError):
                entry = Done.model_validate_json(line)
                done[entry.key] = entry
    return done


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name} became shorter while it was read")


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
