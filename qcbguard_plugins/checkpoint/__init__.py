"""Safetensors folders and GGUF files: read without trust, written whole or not at all."""

from __future__ import annotations

from qcbguard_plugins.checkpoint.atomic import hash_file
from qcbguard_plugins.checkpoint.journal import partial_of
from qcbguard_plugins.checkpoint.reader import Checkpoint, TensorEntry, open_checkpoint
from qcbguard_plugins.checkpoint.staging import FolderStaging, resumable_folder

__all__ = [
    "Checkpoint",
    "FolderStaging",
    "TensorEntry",
    "hash_file",
    "open_checkpoint",
    "partial_of",
    "resumable_folder",
]
