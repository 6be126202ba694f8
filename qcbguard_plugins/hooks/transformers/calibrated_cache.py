"""Calibrated weights, kept between loads under a name made of everything that they depend on."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcbguard_plugins._util.dtypes import DTYPES, dtype_name
from qcbguard_plugins._util.records import Record
from qcbguard_plugins.backends.formats import versions
from qcbguard_plugins.checkpoint import hash_file
from qcbguard_plugins.checkpoint.journal import KeptWork, bytes_of, hash_bytes, resumable, state_of
from qcbguard_plugins.checkpoint.manifest import TensorRecord
from qcbguard_plugins.checkpoint.shard_writer import make_room
from qcbguard_plugins.errors import CheckpointError, TargetExistsError, UncalibratableError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.models.layers import target_of
from qcbguard_plugins.models.loading import tokenizer_beside
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.models.text_pass import one_line
from qcbguard_plugins.pipeline.calibrated import guard_layers, tokens_for
from qcbguard_plugins.pipeline.settings import Guard

_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES}
_FOLDER = "folder"
_WEIGHTS_FILE = "guarded.safetensors"
_RECORD_FILE = "guarded.json"
_DIGESTS_FILE = "file-digests.json"
_MEMO = TypeAdapter(dict[str, str])


class _Kept(Record):
    """The record of a cache entry: the seed, and for each tensor the plan and the hash of the weight before."""

    seed: int = Field(ge=0)
    tensors: tuple[TensorRecord, ...]
    sources: dict[str, str]


@dataclass(frozen=True)
class CalibratedWeights:
    """Guarded weights on disk, read one at a time.

    Attributes:
        folder: Folder of the cache entry.
        guard: The guard that made them, its seed known.
        records: The plan for each tensor, by parameter name.
        sources: Hash of each weight that was guarded, by parameter name.
    """

    folder: Path
    guard: Guard
    records: dict[str, TensorRecord]
    sources: dict[str, str]

    def is_of(self, name: str, stored: Tensor) -> bool:
        """Whether this is the weight that was guarded.

        Arguments of the caller's load that do not show in its files, such as ``key_mapping``, may make it another.
        """
        record = self.records.get(name)
        if record is None:
            return False
        return hash_bytes(bytes_of(stored.to(_DTYPES[record.read_dtype]))) == self.sources[name]

    def get(self, name: str) -> tuple[Tensor, TensorRecord]:
        """A guarded weight as the checkpoint would store it, and the plan for it."""
        try:
            with safe_open(self.folder / _WEIGHTS_FILE, framework="pt") as file:
                return file.get_tensor(name), self.records[name]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{name}: the cache {self.folder} cannot be read: {error}", remedy="Delete that folder and load again."
            ) from error


@contextlib.contextmanager
def calibrated_weights(
    skeleton: Any,
    files: Sequence[Path],
    dtype: torch.dtype | None,
    layers: Mapping[str, bool],
    grid: Grid,
    guard: Guard,
) -> Iterator[CalibratedWeights]:
    """Guard the layers of a model with a calibrated method, or find that done already.

    Args:
        skeleton: The model without weights that transformers is about to fill, for its class and configuration.
        files: The safetensors files that it will be filled from.
        dtype: Dtype in which it will be loaded.
        layers: The layers that the stock quantizer takes, each with true where its weight is stored transposed.
        grid: Grid of the stock quantizer.
        guard: The guard as the user asked for it. Without a seed, an earlier result with a seed of its own serves.

    Raises:
        CheckpointError: The cache cannot be read.
        CalibrationError: What the user calibrates with cannot be used.
        UncalibratableError: The model cannot be calibrated.
    """
    unsafe = [file.name for file in files if file.suffix != ".safetensors"]
    if not files or unsafe:
        what = f"{unsafe[0]} is not safetensors" if unsafe else "the load has no checkpoint files"
        raise UncalibratableError(f"calibration reads safetensors files, and {what}")
    tokenizer = tokenizer_beside(files)
    guard = guard.with_source(has_tokenizer=tokenizer is not None)
    tokens = tokens_for(guard, skeleton.config, tokenizer)
    with _writable(guard.cache_dir or user_cache_path("qcbguard")) as cache_dir:
        yield _kept_or_made(skeleton, files, dtype, layers, grid, guard, tokens, cache_dir)


@contextlib.contextmanager
def _writable(cache_dir: Path) -> Iterator[Path]:
    """The cache; one that is gone after the load where the user's cannot be written to."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        warnings.warn(
            f"Calibrated weights are not kept for the next load: {error.strerror or error}: {cache_dir}. "
            "Name a folder that can be written to with Guard(cache_dir=...).",
            stacklevel=2,
        )
        with tempfile.TemporaryDirectory(prefix="qcbguard-") as folder:
            yield Path(folder)
    else:
        yield cache_dir


def _kept_or_made(
    skeleton: Any,
    files: Sequence[Path],
    dtype: torch.dtype | None,
    layers: Mapping[str, bool],
    grid: Grid,
    guard: Guard,
    tokens: Tensor | None,
    cache_dir: Path,
) -> CalibratedWeights:
    key = {
        "files": {file.name: digest for file, digest in _digests(files, cache_dir).items()},
        "tokens": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "guard": guard.describe(),
        "format": grid.name,
        "dtype": str(dtype),
        "layers": dict(sorted(layers.items())),
        "class": type(skeleton).__name__,
        "versions": versions(),
    }
    key = json.loads(json.dumps(key, sort_keys=True, default=str))
    folder = cache_dir.absolute() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if folder.exists() and not _is_whole(folder, layers):
        shutil.rmtree(folder)  # an entry that something else has half deleted is made again
    if not folder.exists():

        def state() -> dict[str, list[int]]:
            return {file.name: state_of(file) for file in files}

        # Of two processes that want an entry, one makes it and the other waits; a killed one's work is taken over.
        with (
            contextlib.suppress(TargetExistsError),
            resumable(folder, _FOLDER, key, state, files[0].parent, wait=True) as partial,
        ):
            model = _load_full_precision(skeleton, files, dtype)
            targets = [target_of(model, name, grid, transposed=transposed) for name, transposed in layers.items()]
            _fill(partial, model, targets, guard, tokens)
    return _open(folder, guard)


def _is_whole(folder: Path, layers: Mapping[str, bool]) -> bool:
    """Whether an entry has its record and all its weights."""
    try:
        names = {record.name for record in _Kept.model_validate_json((folder / _RECORD_FILE).read_bytes()).tensors}
        with safe_open(folder / _WEIGHTS_FILE, framework="pt") as file:
            return names == set(file.keys()) == {f"{name}.weight" for name in layers}
    except (OSError, ValueError, SafetensorError):
        return False


def _fill(partial: Path, model: Any, targets: Sequence[Target], guard: Guard, tokens: Tensor | None) -> None:
    """Guard the layers of a model into the files of a cache entry, except those that an interrupted load has done."""
    kept = KeptWork(partial)
    seed = kept.remember("seed", lambda: guard.with_seed().seed)
    folder = partial / _FOLDER
    folder.mkdir(exist_ok=True)
    weights = {target.name: model.get_parameter(target.name).data for target in targets}
    spans = make_room(folder / _WEIGHTS_FILE, {name: (w.dtype, tuple(w.shape)) for name, w in weights.items()})
    sources = {name: hash_bytes(bytes_of(weight)) for name, weight in weights.items()}
    records = {name: kept.resumed(spans[name], functools.partial(sources.__getitem__, name)) for name in weights}
    pending = [name for name, record in records.items() if record is None]
    for target, guarded, record in guard_layers(model, targets, replace(guard, seed=seed), tokens, pending=pending):
        records[target.name] = record
        kept.write(spans[target.name], sources[target.name], guarded, record)
    made = tuple(record for record in records.values() if record is not None)
    content = _Kept(seed=seed, tensors=made, sources=sources)
    (folder / _RECORD_FILE).write_text(content.model_dump_json(), encoding="utf-8")


def _load_full_precision(skeleton: Any, files: Sequence[Path], dtype: torch.dtype | None) -> Any:
    """Load the model from the very files that transformers resolved, each tensor when it is needed."""
    config = copy.deepcopy(skeleton.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        state_dict = {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118
        try:
            # What the outer load refuses it refuses itself; here it has not been asked yet.
            model = type(skeleton).from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, ignore_mismatched_sizes=True
            )
        except Exception as error:  # a checkpoint may break in any way
            raise UncalibratableError(
                f"{type(skeleton).__name__} cannot be loaded in full precision ({one_line(error)})"
            ) from error
    return model.eval()


def _open(folder: Path, guard: Guard) -> CalibratedWeights:
    try:
        kept = _Kept.model_validate_json((folder / _RECORD_FILE).read_bytes())
        records = {record.name: record for record in kept.tensors}
        return CalibratedWeights(folder, replace(guard, seed=kept.seed), records, kept.sources)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the cache {folder} cannot be read: {error}", remedy="Delete that folder and load again."
        ) from error


def _digests(files: Sequence[Path], cache_dir: Path) -> dict[Path, str]:
    """SHA-256 of each file; one whose path, size, time and inode are known is not read again."""
    memo_path = cache_dir / _DIGESTS_FILE
    memo: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # what cannot be read is made again
        memo = _MEMO.validate_json(memo_path.read_bytes())
    digests, fresh = {}, {}
    for file in files:
        stat = file.resolve().stat()
        identity = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        digests[file] = memo.get(identity) or hash_file(file)
        fresh[identity] = digests[file]
    if fresh.items() - memo.items():
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = memo_path.with_suffix(f".{hashlib.sha256(repr(fresh).encode()).hexdigest()[:8]}.tmp")
        temporary.write_text(json.dumps({**memo, **fresh}), encoding="utf-8")
        temporary.replace(memo_path)
    return digests
