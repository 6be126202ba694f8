"""Decide which files of a folder a load takes, so that what is tested, guarded and verified is what gets loaded.

The order is that of transformers: ``transformers_weights`` in config.json, rank-local shards, ``model.safetensors``,
the index. An adapter in the folder is put on top. Where a folder holds more than one answer, or where other loaders
(vLLM, llama.cpp's converter, transformers on a file system that ignores case) take other files than transformers, the
folder is refused; nothing is guessed. Pickles are never opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcbguard_plugins.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"

# Suffixes of files that hold weights, in the forms that loaders know.
WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".pkl",
    ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".ot", ".nemo",
})  # fmt: skip

# transformers loads a folder with such a name as a distributed checkpoint, whatever else is in it.
_RANK_LOCAL_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")

# Weights of the same model that no loader takes unless it is told to, by name: how it is told.
_PASSED_OVER = (
    (re.compile(r"consolidated[^/]*\.(safetensors|pth|pt)", re.IGNORECASE), "vLLM takes it in Mistral's own format"),
    (re.compile(r"pytorch_model[^/]*\.bin", re.IGNORECASE), "a pickle, taken with use_safetensors=False"),
    (re.compile(r".+/[^/]+\.safetensors", re.IGNORECASE), "taken with subfolder="),
)
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class PassedOver:
    """A file with weights that a load takes only where it is told to.

    Attributes:
        name: Its path in the folder.
        taken_by: What takes it.
    """

    name: str
    taken_by: str


@dataclass(frozen=True)
class LoadedFiles:
    """What a load of a folder takes.

    Attributes:
        config: Its ``config.json``.
        shard_of: File name of each tensor by the index; ``None`` for a single file.
        shards: File names of the weight files, sorted.
    """

    config: dict[str, Any]
    shard_of: dict[str, str] | None
    shards: tuple[str, ...]


def loaded_files(folder: Path | str) -> LoadedFiles:
    """The files that every loader takes from a folder.

    Raises:
        CheckpointError: It holds no checkpoint in full precision, or loaders may take different weights from it; the
            message names the files concerned and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder",
            remedy="Give the folder with config.json and the safetensors files; download a hub model first.",
        )
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    if CONFIG_FILE not in names and ADAPTER_CONFIG_FILE in names:
        raise CheckpointError(
            f"{folder} holds an adapter and no model",
            remedy="Give the folder of its base model, or merge the two with peft's merge_and_unload first.",
        )
    config = read_json(folder / CONFIG_FILE)
    _require_full_precision(folder, config)
    shard_of = _read_index(folder) if INDEX_FILE in names else None
    if shard_of is not None and (SINGLE_FILE not in names or set(shard_of.values()) != {SINGLE_FILE}):
        shards = tuple(sorted(set(shard_of.values())))
    else:
        shard_of, shards = None, (SINGLE_FILE,)
    conflicts = list(_conflicts(config, names, shards, sharded=shard_of is not None))
    if conflicts:
        raise CheckpointError(
            f"{folder.name} does not say clearly which weights will be loaded",
            details=conflicts,
            remedy="Keep the files of one model in the folder and move the others out; a single .safetensors file can "
            "be scanned by its own path.",
        )
    _require_present(folder, shards, sharded=shard_of is not None)
    return LoadedFiles(config, shard_of, shards)


def passed_over(folder: Path) -> tuple[PassedOver, ...]:
    """The other files of a folder that hold weights of a model and that some loaders can be told to take."""
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        taken_by = next((how for pattern, how in _PASSED_OVER if pattern.fullmatch(name)), "")
        if taken_by and file.is_file():
            found.append(PassedOver(name, taken_by))
    return tuple(found)


def remote_model_classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The model classes that a configuration asks to be run from code of its own."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict):
        return ()
    return tuple(sorted(str(auto_map[name]) for name in auto_map if str(name).startswith(("AutoModel", "TFAuto"))))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} does not hold a JSON object")
    return content


def _require_full_precision(folder: Path, config: dict[str, Any]) -> None:
    for section in _sections(config):
        for key in _QUANTIZATION_KEYS:
            settings = section.get(key)
            if settings is None:
                continue
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
            raise CheckpointError(
                f"{folder.name} is quantized already (quant_method {method})",
                remedy="Guard the full-precision checkpoint: what an attacker hid is in the codes of this one.",
            )


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those of its parts: the text model of a vision-language model has one of its own."""
    yield config
    yield from (part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict))


def _read_index(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
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
    return weight_map


def _conflicts(config: dict[str, Any], names: list[str], shards: tuple[str, ...], *, sharded: bool) -> Iterator[str]:
    """One line for each pair of answers to the question which weights are loaded."""
    taken = INDEX_FILE if sharded else SINGLE_FILE
    if sharded and SINGLE_FILE in names:
        yield f"{SINGLE_FILE} and {INDEX_FILE}  transformers takes the first, other loaders the shards of the second"
    for section in _sections(config):
        named = section.get("transformers_weights")
        if named is not None and named != taken:
            yield (
                f"{named} and {taken}  transformers takes the first, which {CONFIG_FILE} names as "
                "transformers_weights, other loaders the second"
            )
    if config.get("configuration_files"):
        yield (
            f"{CONFIG_FILE} and {config['configuration_files']}  some versions of transformers read the configuration "
            "from the second"
        )
    folded = [name.casefold() for name in names]
    adapters = [name for name, lower in zip(names, folded, strict=True) if lower == ADAPTER_CONFIG_FILE]
    for name in adapters:
        yield f"{name} and {taken}  with peft installed, transformers puts the adapter on the model of the second"
    for name, lower in zip(names, folded, strict=True):
        if _RANK_LOCAL_SHARD.match(lower):
            yield f"{name} and {taken}  transformers takes the first, as part of a distributed checkpoint"
        elif lower.endswith(".safetensors") and name not in (*shards, SINGLE_FILE) and not _is_passed_over(lower):
            yield f"{name} and {taken}  transformers takes the second; some loaders take every safetensors file"
        elif lower in (CONFIG_FILE, INDEX_FILE, SINGLE_FILE) and name != lower:
            yield f"{name} and {lower}  a file system that ignores case holds one of them alone"


def _is_passed_over(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern, _ in _PASSED_OVER)


def _require_present(folder: Path, shards: tuple[str, ...], *, sharded: bool) -> None:
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing and sharded:
        raise CheckpointError(f"{len(missing)} shards of {INDEX_FILE} are missing", details=missing)
    if missing:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
            details=[f"{name}  a pickle, which is never opened" for name in pickles],
            remedy="Convert the model to safetensors first." if pickles else "",
        )
