"""Which tensors of a checkpoint the stock quantizer will read, found out from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcbguard_plugins._util.dtypes import DTYPES
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from qcbguard_plugins.errors import CheckpointError, UnguardableError, UsageError
from qcbguard_plugins.grids import Grid, IntegerGrid

if TYPE_CHECKING:
    from qcbguard_plugins.backends.ggml.folder import FolderTypes
    from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.pipeline.ignore import matching
from qcbguard_plugins.pipeline.target import Target


@dataclass(frozen=True)
class Plan:
    """What a run will do to a checkpoint.

    Attributes:
        checkpoint: The source.
        formats: The formats as the user spelled them.
        targets: Tensors that will be guarded.
        ignored: Names of target tensors that the user leaves unguarded.
        gguf: What llama.cpp will make of the folder, where one of the formats is a GGUF recipe.
    """

    checkpoint: Checkpoint
    formats: tuple[str, ...]
    targets: tuple[Target, ...]
    ignored: tuple[str, ...]
    gguf: FolderTypes | None = None

    @property
    def format(self) -> str:
        """The formats in one string, as ``--for`` takes them."""
        return ",".join(self.formats)

    def grids(self, target: Target) -> list[Grid]:
        """The grids of a tensor."""
        return [
            self.gguf.grid(target.name, target.shape[1]) if self.gguf and name.startswith("gguf:") else get_grid(name)
            for name in target.formats
        ]

    @property
    def num_weights(self) -> int:
        return sum(target.num_weights for target in self.targets)


def make_plan(source: Path | str, format: str, *, ignore: Sequence[str] = (), gguf: GgufOptions | None = None) -> Plan:
    """List every tensor that the stock quantizers will read, and how each will be guarded.

    Args:
        source: Folder of a full-precision checkpoint.
        format: Such as ``nf4``, ``int8``, ``gptq-w4g128`` or ``gguf:Q4_K_M``, or several with commas.
        ignore: Patterns of parameter names to leave unguarded: globs, or regular expressions after ``re:``.
        gguf: How the folder will be converted and quantized, for a GGUF format.

    Raises:
        CheckpointError: The folder cannot be read.
        UsageError: A format is unknown, or a pattern matches no target.
        UnguardableError: Targets cannot be guarded: their dtype, or a tensor that transformers assembles on loading.
    """
    from qcbguard_plugins.models.skeleton import build_skeleton, load_config, parameter_keys

    formats = _split_formats(format)
    checkpoint = open_checkpoint(source)
    config = load_config(checkpoint.path)
    _require_stored_layers(config, checkpoint)
    skeleton = build_skeleton(config)
    keys = parameter_keys(skeleton, checkpoint.tensors)
    layers = _read_tensors(formats, config, checkpoint, keys, gguf)
    if not layers.formats_of:
        raise UnguardableError(f"{checkpoint.path.name} has no layer that {format} quantizes")
    names = list(layers.formats_of)
    ignored = matching(names, ignore)
    targets, problems = [], []
    for name in names:
        if name in ignored:
            continue
        entry = checkpoint.tensors.get(keys.get(name, ""))
        problem = _problem(name, entry) or layers.problem(name, entry)
        if problem or entry is None:
            problems.append(problem)
        else:
            targets.append(layers.target(name, entry, config.dtype))
    if problems:
        raise UnguardableError(
            f"{len(problems)} tensors cannot be guarded on grid {format}",
            details=problems,
            remedy="Leave them out with --ignore; they will be listed as unguarded and the run will exit 3.",
        )
    return Plan(checkpoint, formats, tuple(targets), tuple(sorted(ignored)), layers.gguf)


def _require_stored_layers(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a configuration of more layers than there are tensors: a model without weights takes memory too.

    Raises:
        CheckpointError: It describes another model.
    """
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(num_layers, int) and num_layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json describes {num_layers} layers, and the checkpoint holds {len(checkpoint.tensors)} tensors",
            remedy="The configuration and the weights are not of one model.",
        )


def _split_formats(format: str) -> tuple[str, ...]:
    formats = tuple(part.strip() for part in format.split(","))
    if len(set(formats)) < len(formats) or sum(name.startswith("gguf:") for name in formats) > 1:
        raise UsageError(f"{format!r} names a format twice, or two GGUF recipes", remedy="Guard once for each of them.")
    for name in formats:
        if not name.startswith("gguf:"):
            get_grid(name)
    return formats


@dataclass(frozen=True)
class _ReadTensors:
    """Which formats read which parameters, and how."""

    formats_of: dict[str, tuple[str, ...]]
    transposed: set[str]
    gguf: FolderTypes | None
    tied: bool
    inputs_of: dict[str, str | None]

    def problem(self, name: str, entry: TensorEntry | None) -> str:
        """Why a grid cannot cut a weight into its groups; empty where it can."""
        assert entry is not None, "checked before"
        columns = entry.shape[0 if name in self.transposed else 1]
        for format_name in self.formats_of[name]:
            grid = None if format_name.startswith("gguf:") else get_grid(format_name)
            group_size = grid.group_size if isinstance(grid, IntegerGrid) else None
            if group_size is not None and group_size > 0 and columns % group_size:
                return f"{name}  in_features={columns}, group_size={group_size}"
        return ""

    def target(self, name: str, entry: TensorEntry, configured: torch.dtype | None) -> Target:
        assert entry.dtype is not None, "checked before"
        shape = entry.shape[::-1] if name in self.transposed else entry.shape
        read_dtype = _coarser(entry.dtype, configured)
        stored_name = ""
        inputs_of = self.inputs_of.get(name, "")
        if self.gguf is not None and name in self.gguf.names:
            stored_name = self.gguf.names[name]
            # The converter reads the stored weights, whatever dtype transformers would load.
            read_dtype = _coarser(entry.dtype, self.gguf.outtype)
            if stored_name == "token_embd.weight":
                inputs_of = "lm_head" if self.tied else None
        return Target(
            name,
            entry.key,
            (shape[0], shape[1]),
            entry.dtype,
            read_dtype,
            name in self.transposed,
            self.formats_of[name],
            stored_name,
            inputs_of,
        )


def _read_tensors(
    formats: tuple[str, ...],
    config: Any,
    checkpoint: Checkpoint,
    keys: dict[str, str],
    gguf: GgufOptions | None,
) -> _ReadTensors:
    """Ask each toolchain what it will read."""
    tied = bool(getattr(config, "tie_word_embeddings", False))
    folder = None
    formats_of: dict[str, tuple[str, ...]] = {}
    transposed: set[str] = set()
    inputs_of: dict[str, str | None] = {}
    for name in sorted(formats, key=lambda name: not name.startswith("gguf:")):
        if name.startswith("gguf:"):
            from qcbguard_plugins.backends.ggml.folder import folder_types
            from qcbguard_plugins.backends.ggml.options import GgufOptions
            from qcbguard_plugins.models.skeleton import build_skeleton, transposed_parameters

            transposed = transposed_parameters(build_skeleton(config))
            shapes = {n: checkpoint.tensors[k].shape for n, k in keys.items() if not (tied and n == "lm_head.weight")}
            stored = [(n, shape[::-1] if n in transposed else shape) for n, shape in shapes.items()]
            folder = folder_types(config, stored, name.removeprefix("gguf:"), gguf or GgufOptions())
            formats_of = {parameter: (f"gguf:{type_name}",) for parameter, type_name in folder.types.items()}
            continue
        from qcbguard_plugins.backends.layers import quantized_layers

        for layer, taken in quantized_layers(name, config).items():
            parameter = f"{layer}.weight"
            formats_of[parameter] = (*formats_of.get(parameter, ()), taken.format)
            inputs_of[parameter] = taken.inputs_of
            if taken.transposed:
                transposed.add(parameter)
    return _ReadTensors(formats_of, transposed, folder, tied, inputs_of)


def _problem(name: str, entry: TensorEntry | None) -> str:
    """Why a tensor cannot be guarded; empty where it can."""
    if entry is None:
        return f"{name}  not stored as one tensor of the checkpoint"
    if entry.dtype not in DTYPES:
        return f"{name}  stored as {entry.dtype or 'a dtype that is not full precision'}"
    return "" if len(entry.shape) == 2 else f"{name}  shape {entry.shape} is not a matrix"


def _coarser(stored: torch.dtype, configured: torch.dtype | None) -> torch.dtype:
    if configured in DTYPES and torch.finfo(configured).eps > torch.finfo(stored).eps:
        return configured
    return stored
