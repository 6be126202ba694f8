"""Safetensors folders and GGUF files: read without trust, written whole or not at all."""

from __future__ import annotations

from qcbguard_plugins.checkpoint.reader import Checkpoint, TensorEntry, open_checkpoint
from qcbguard_plugins.checkpoint.writer import hash_file, publish_file, publish_folder, rewrite_shard

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "hash_file",
    "open_checkpoint",
    "publish_file",
    "publish_folder",
    "rewrite_shard",
]
