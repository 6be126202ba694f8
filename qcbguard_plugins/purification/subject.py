"""What is purified: a whole model, or the adapter on a model that stays as it is."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
import xxhash
from torch import Tensor

from qcbguard_plugins.checkpoint import Checkpoint, open_checkpoint
from qcbguard_plugins.checkpoint.journal import bytes_of
from qcbguard_plugins.checkpoint.loaded_files import INDEX_FILE
from qcbguard_plugins.checkpoint.manifest import MANIFEST_FILE
from qcbguard_plugins.checkpoint.purification_note import PURIFICATION_FILE
from qcbguard_plugins.checkpoint.reader import read_header
from qcbguard_plugins.errors import CheckpointError, MissingDependencyError, PurificationError, UsageError
from qcbguard_plugins.purification.architectures import Architecture, find_architecture
from qcbguard_plugins.purification.units import Group, attention_heads, lora_heads, lora_ranks, mlp_channels

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
#: Settings of an adapter under which it holds more than low-rank updates of linear layers.
_MORE_THAN_LORA: Final = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")


@dataclass(frozen=True)
class Subject(ABC):
    """What is purified.

    Attributes:
        model_dir: Folder of the model.
        choice: Its architecture, or the name of one; ``None`` for that of its configuration.
    """

    model_dir: Path
    choice: Architecture | str | None = None

    mode: ClassVar[Literal["model", "adapter"]]

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """The files that a purified folder replaces."""

    @abstractmethod
    def load(self) -> Any:
        """The model in float32, in memory, with gradients where it may change."""

    def outline(self) -> Any:
        """The model's modules and shapes, for a plan; without its weights where that can be."""
        return self.load()

    @abstractmethod
    def groups(self, model: Any, *, heads: bool) -> list[Group]:
        """Its units: those of the MLPs, and with ``heads`` those of the attention behind them."""

    @abstractmethod
    def save(self, model: Any, folder: Path) -> list[str]:
        """Write what was purified.

        Returns:
            Files of the source with weights in another form, which the folder does not carry.

        Raises:
            PurificationError: A weight cannot be stored.
        """

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from qcbguard_plugins.models.skeleton import load_config

        return load_config(self.model_dir)

    @cached_property
    def architecture(self) -> Architecture:
        """Where its units lie."""
        return find_architecture(self.config, self.choice)

    def frozen_digest(self, model: Any) -> str:
        """Hash of all that must not change; empty where nothing is frozen."""
        return ""


class WholeModel(Subject):
    """Every weight may hold the backdoor, and every weight may change."""

    mode = "model"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.model_dir)

    def load(self) -> Any:
        from qcbguard_plugins.models.loading import load_full_precision

        return load_full_precision(self.model_dir, torch.float32)

    def outline(self) -> Any:
        from qcbguard_plugins.models.skeleton import build_skeleton

        return build_skeleton(self.config)

    def groups(self, model: Any, *, heads: bool) -> list[Group]:
        channels = mlp_channels(model, self.architecture)
        return [*channels, *attention_heads(model, self.architecture)] if heads else channels

    def save(self, model: Any, folder: Path) -> list[str]:
        dtypes = {entry.dtype for entry in self.checkpoint.tensors.values() if entry.dtype is not None}
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize) if len(dtypes) > 1 else dtypes.pop()
        _require_finite(model.state_dict(), dtype)
        model.to(dtype)
        model.config.use_cache = True
        model.save_pretrained(folder)
        carried, weights = self.checkpoint.other_files()
        # Transformers has cut the shards anew, with an index of its own where there are several.
        carried = [relative for relative in carried if str(relative) != INDEX_FILE]
        _copy_missing(self.model_dir, carried, folder)
        return [str(relative) for relative in weights]


@dataclass(frozen=True)
class Adapter(Subject):
    """Only a LoRA adapter may hold the backdoor; the model under it is frozen.

    Attributes:
        adapter_dir: Folder with its configuration and its safetensors file.
    """

    adapter_dir: Path = Path()

    mode = "adapter"

    @cached_property
    def checkpoint(self) -> Checkpoint:
        path = self.adapter_dir / ADAPTER_CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", remedy="Give the folder of a PEFT adapter."
            ) from error
        if not (self.adapter_dir / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(
                f"{self.adapter_dir.name} has no {ADAPTER_WEIGHTS}",
                remedy="Save the adapter with safe_serialization=True; pickles are not read.",
            )
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise UsageError(f"{self.adapter_dir.name} is not a LoRA adapter", remedy="Merge it and purify the model.")
        more = [name for name in _MORE_THAN_LORA if config.get(name)]
        if config.get("bias", "none") != "none" or config.get("use_dora"):
            more.append("bias" if config.get("bias", "none") != "none" else "use_dora")
        if more:
            raise UsageError(
                f"{self.adapter_dir.name} holds more than low-rank updates: {', '.join(more)}",
                remedy="Merge it into its model and purify that.",
            )
        entries = read_header(self.adapter_dir / ADAPTER_WEIGHTS)
        return Checkpoint(self.adapter_dir, config, (ADAPTER_WEIGHTS,), {entry.key: entry for entry in entries})

    def load(self) -> Any:
        from qcbguard_plugins.models.loading import load_full_precision

        peft = require_peft()
        base = load_full_precision(self.model_dir, torch.float32)
        try:
            model = peft.PeftModel.from_pretrained(
                base, str(self.adapter_dir), is_trainable=True, torch_device="cpu", local_files_only=True
            )
        except Exception as error:  # an adapter is input: whatever it breaks in PEFT is an error about the folder
            raise CheckpointError(f"{self.adapter_dir.name} does not fit the model: {error}") from error
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model

    def groups(self, model: Any, *, heads: bool) -> list[Group]:
        ranks = lora_ranks(model, self.architecture)
        return [*ranks, *lora_heads(model, self.architecture)] if heads else ranks

    def save(self, model: Any, folder: Path) -> list[str]:
        dtypes = {entry.dtype for entry in self.checkpoint.tensors.values() if entry.dtype is not None}
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        adapted = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        _require_finite({str(number): parameter.data for number, parameter in enumerate(adapted)}, dtype)
        for parameter in adapted:
            parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        # What the library writes beside them is a template; the user's own configuration and card stay.
        for name in (ADAPTER_CONFIG, "README.md"):
            (folder / name).unlink(missing_ok=True)
        carried, weights = self.checkpoint.other_files()
        _copy_missing(self.adapter_dir, carried, folder)
        return [str(relative) for relative in weights]

    def frozen_digest(self, model: Any) -> str:
        digest = xxhash.xxh3_128()
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                digest.update(bytes_of(parameter))
        return digest.hexdigest()


def require_peft() -> Any:
    """Import PEFT.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            f"adapters need PEFT: {error}", remedy="pip install 'qcbguard-plugins[purify]'"
        ) from error
    return peft


def _require_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all()
    ]
    if broken:
        raise PurificationError(
            f"{len(broken)} purified tensors hold values that {dtype} cannot",
            details=broken,
            remedy="Lower the learning rates; nothing was written.",
        )


def _copy_missing(source: Path, carried: list[Path], folder: Path) -> None:
    """Copy the source's other files, but for its manifests and for what is there."""
    for relative in carried:
        target = folder / relative
        if target.exists() or str(relative) in (MANIFEST_FILE, PURIFICATION_FILE):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target)
