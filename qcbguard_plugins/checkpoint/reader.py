"""Find out what a checkpoint folder holds, from its headers alone.

Errors, never warnings: a missing or malformed file, an index that disagrees with its shards or points outside the
folder, a folder with nothing but pickles, and a checkpoint that is quantized already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcbguard_plugins.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

# The format's own limit on a header.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Files that hold weights in some other form. A guarded folder must not carry unguarded copies.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".pkl",
    ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".ot", ".nemo",
}  # fmt: skip


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
        """The folder's files besides the shards and their index, relative to it.

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
            (weights if file.suffix.lower() in _WEIGHT_SUFFIXES else carried).append(relative)
        return carried, weights


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a folder with a safetensors checkpoint.

    Raises:
        CheckpointError: The folder cannot be read as one; the message says why and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder",
            remedy="Give the folder with config.json and the safetensors files; download a hub model first.",
        )
    config = _read_json(path / CONFIG_FILE)
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise CheckpointError(
            f"{path.name} is quantized already (quant_method {method})",
            remedy="Guard the full-precision checkpoint: what an attacker hid is in the codes of this one.",
        )
    shard_of = _shard_of_each_tensor(path)
    shards = tuple(sorted(set(shard_of.values())))
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} does not hold a JSON object")
    return content


def _shard_of_each_tensor(path: Path) -> dict[str, str]:
    if not (path / INDEX_FILE).is_file():
        if not (path / SINGLE_FILE).is_file():
            pickles = sorted(file.name for file in path.glob("*.bin"))
            raise CheckpointError(
                f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
                details=[f"{name}  a pickle, which is never opened" for name in pickles],
                remedy="Convert the model to safetensors first." if pickles else "",
            )
        return {entry.key: SINGLE_FILE for entry in read_header(path / SINGLE_FILE)}
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE} has no weight_map")
    for key, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or Path(shard).name != shard
            or "\\" in shard
        ):
            raise CheckpointError(
                f"{INDEX_FILE} places {key} in {shard!r}, which is not a safetensors file of the folder"
            )
    missing = sorted({shard for shard in weight_map.values() if not (path / shard).is_file()})
    if missing:
        raise CheckpointError(f"{len(missing)} shards of {INDEX_FILE} are missing", details=missing)
    return weight_map


def _compare_with_index(shard_of: dict[str, str], entries: list[TensorEntry]) -> None:
    found: dict[str, str] = {}
    problems = []
    for entry in entries:
        if entry.key in found:
            problems.append(f"{entry.key}  stored twice, in {found[entry.key]} and {entry.shard}")
        elif entry.key not in shard_of:
            problems.append(f"{entry.key}  stored in {entry.shard} and not listed")
        elif shard_of[entry.key] != entry.shard:
            problems.append(f"{entry.key}  listed in {shard_of[entry.key]} and stored in {entry.shard}")
        found[entry.key] = entry.shard
    problems += [
        f"{key}  listed in {shard} and not stored there" for key, shard in shard_of.items() if key not in found
    ]
    if problems:
        raise CheckpointError(f"{INDEX_FILE} disagrees with its shards about {len(problems)} tensors", details=problems)
