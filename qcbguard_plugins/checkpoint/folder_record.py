"""A guarded folder as it was when it was made: what decides which weights a load takes, and a comparison with it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from qcbguard_plugins._util.records import Record
from qcbguard_plugins.checkpoint.atomic import hash_file
from qcbguard_plugins.checkpoint.loaded_files import CONFIG_FILE, WEIGHT_SUFFIXES, loaded_files
from qcbguard_plugins.errors import CheckpointError

# Of config.json: what says which class is built, which files fill it, and what becomes of them.
_LOADING_KEYS = (
    "architectures", "auto_map", "configuration_files", "compression_config", "dtype", "model_type",
    "quantization_config", "tie_word_embeddings", "torch_dtype", "transformers_weights",
)  # fmt: skip
# Names of files that loaders look for: one that was added may change what is loaded.
_LOOKED_FOR = re.compile(
    r"(^|/)([^/]*config[^/]*\.json|[^/]*\.index\.json|modules\.json|params\.json|tokenizer[^/]*\.json|[^/]*\.(py|jinja))$",
    re.IGNORECASE,
)
# Prose, which people edit after they guarded a model.
_PROSE = re.compile(r"(^|/)(\.gitattributes|LICEN[CS]E[^/]*|[^/]*\.md)$", re.IGNORECASE)
_GIT = ".git"


class FolderRecord(Record):
    """What a guarded folder held when it was made, besides its guarded weight files.

    Attributes:
        loading_keys: Of ``config.json``, what decides how the model is loaded, by dotted key.
        files: SHA-256 of every other file except prose: the configuration, the index, the tokenizer, code.
    """

    loading_keys: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)


def record_folder(folder: Path, *, except_for: frozenset[str] = frozenset()) -> FolderRecord:
    """Record a folder that was just made.

    Args:
        folder: The folder.
        except_for: Names of files that are recorded elsewhere or are written later, such as the manifest.

    Raises:
        CheckpointError: It does not say clearly which weights will be loaded.
    """
    config = loaded_files(folder).config
    files = {
        name: hash_file(folder / name) for name in _files(folder) if name not in except_for and not _PROSE.search(name)
    }
    return FolderRecord(loading_keys=loading_keys(config), files=files)


def compare_folder(folder: Path, record: FolderRecord, weights: dict[str, str], *, own: frozenset[str]) -> list[str]:
    """What has changed in a folder that decides which weights are loaded.

    Args:
        folder: The folder.
        record: What it held when it was made.
        weights: SHA-256 of its weight files by name, as recorded.
        own: Names of files that need no record: the manifest itself.

    Returns:
        A line for each problem, the name of the file first; empty where the folder is as it was made.
    """
    return [
        *_changed(folder, {**record.files, **weights}),
        *_added(folder, record, weights, own),
        *_other_keys(folder, record),
    ]


def loading_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What decides how a model is loaded, by dotted key, the parts of a composite model included."""
    found = {key: config[key] for key in _LOADING_KEYS if config.get(key) is not None}
    for name, part in config.items():
        if name.endswith("_config") and name not in _LOADING_KEYS and isinstance(part, dict):
            found |= {f"{name}.{key}": part[key] for key in _LOADING_KEYS if part.get(key) is not None}
    return found


def _changed(folder: Path, recorded: dict[str, str]) -> Iterator[str]:
    for name, digest in sorted(recorded.items()):
        path = folder / name
        if not path.is_file():
            yield f"{name}  is missing"
        elif hash_file(path) != digest:
            yield f"{name}  has changed since the folder was guarded"


def _added(folder: Path, record: FolderRecord, weights: dict[str, str], own: frozenset[str]) -> Iterator[str]:
    known = {*record.files, *weights, *own}
    for name in _files(folder):
        if name in known:
            continue
        if Path(name).suffix.lower() in WEIGHT_SUFFIXES:
            yield f"{name}  holds weights and is not of the guarded folder"
        elif _LOOKED_FOR.search(name):
            yield f"{name}  can change what is loaded and is not of the guarded folder"
    for name in _linked_folders(folder):
        yield f"{name}  is a link to another folder, whose files are not of the guarded one"


def _other_keys(folder: Path, record: FolderRecord) -> Iterator[str]:
    """Which key of the configuration says something else; the hash alone says only that something does."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        found = loading_keys(config) if isinstance(config, dict) else {}
    except (OSError, ValueError, RecursionError):
        return  # missing or malformed, which its hash has said
    for key in sorted({*found, *record.loading_keys}):
        if found.get(key) != record.loading_keys.get(key):
            yield f"{CONFIG_FILE}  {key} is {found.get(key)!r}, and was {record.loading_keys.get(key)!r}"


def _files(folder: Path) -> Iterator[str]:
    """Every file by its path in the folder, links to files included, links to folders not followed."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if name != _GIT)
        for name in sorted(names):
            yield (Path(place) / name).relative_to(folder).as_posix()


def _linked_folders(folder: Path) -> Iterator[str]:
    for place, folders, _ in os.walk(folder, onerror=_refuse):
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                yield (Path(place) / name).relative_to(folder).as_posix()


def _refuse(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
