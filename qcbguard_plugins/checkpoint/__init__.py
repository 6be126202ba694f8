"""Safetensors folders and GGUF files: read without trust, written whole or not at all."""

from __future__ import annotations

from qcbguard_plugins.checkpoint.reader import Checkpoint, TensorEntry, open_checkpoint
from qcbguard_plugins.checkpoint.workspace import Workspace, partial_of, resumable_folder
from qcbguard_plugins.checkpoint.writer import hash_file, publish_file, publish_folder

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "Workspace",
    "hash_file",
    "open_checkpoint",
    "partial_of",
    "publish_file",
    "publish_folder",
    "resumable_folder",
]
