"""Which tensors of a checkpoint the stock quantizer will read, found out from headers alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qcbguard_plugins.checkpoint import Checkpoint, open_checkpoint
from qcbguard_plugins.errors import UnguardableError, UsageError
from qcbguard_plugins.grids import Grid, get_grid
from qcbguard_plugins.rounding import DTYPES


@dataclass(frozen=True)
class Target:
    """A tensor that the stock quantizer will read.

    Attributes:
        name: Parameter name in the model.
        key: Name in the checkpoint.
        shape: ``(out_features, in_features)`` as the quantizer reads it.
        dtype: Stored dtype.
        read_dtype: Dtype in which transformers loads it unless told otherwise: that of the configuration where it is
            coarser than the stored one. A weight planned on the coarser grid lands from both.
        transposed: True where the checkpoint stores ``[in_features, out_features]``.
    """

    name: str
    key: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read_dtype: torch.dtype
    transposed: bool

    @property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Plan:
    """What a run will do to a checkpoint.

    Attributes:
        checkpoint: The source.
        format: The format as the user spelled it.
        targets: Tensors that will be guarded.
        ignored: Names of target tensors that the user leaves unguarded.
    """

    checkpoint: Checkpoint
    format: str
    targets: tuple[Target, ...]
    ignored: tuple[str, ...]

    @property
    def grid(self) -> Grid:
        return get_grid(self.format)

    @property
    def num_weights(self) -> int:
        return sum(target.num_weights for target in self.targets)

    def peak_bytes(self, *, calibrated: bool) -> int:
        """An estimate of the memory that guarding takes beyond the program's own.

        One weight costs its two stored forms, its float32 form and its code; a calibrated run holds the model besides,
        and for one layer the Hessian, its float64 factors and the working matrices.
        """
        if not self.targets:
            return 0
        largest = max(self.targets, key=lambda target: target.num_weights)
        tensor = largest.num_weights * (2 * largest.dtype.itemsize + 5)
        if not calibrated:
            return tensor
        model = sum(entry.num_bytes for entry in self.checkpoint.tensors.values())
        widest = max(target.shape[1] for target in self.targets)
        return model + tensor + largest.num_weights * 16 + widest**2 * 32


def make_plan(source: Path | str, format: str, *, ignore: Sequence[str] = ()) -> Plan:
    """List every tensor that the stock quantizer will read, and how each will be guarded.

    Args:
        source: Folder of a full-precision checkpoint.
        format: ``nf4``, ``fp4``, ``int8`` or one with a block size.
        ignore: Patterns of parameter names to leave unguarded: globs, or regular expressions after ``re:``.

    Raises:
        CheckpointError: The folder cannot be read.
        UsageError: The format is unknown, or a pattern matches no target.
        UnguardableError: Targets cannot be guarded: their dtype, or a tensor that transformers assembles on loading.
    """
    from qcbguard_plugins.backends.bitsandbytes.stock import config_for, quantized_layers
    from qcbguard_plugins.backends.transformers import build_skeleton, load_config, parameter_keys

    get_grid(format)
    checkpoint = open_checkpoint(source)
    config = load_config(checkpoint.path)
    skeleton = build_skeleton(config)
    keys = parameter_keys(skeleton, checkpoint.tensors)
    layers = quantized_layers(skeleton, config_for(format))
    if not layers:
        raise UnguardableError(f"{checkpoint.path.name} has no layer that {format} quantizes")
    names = [f"{layer}.weight" for layer in layers]
    ignored = matching(names, ignore)
    targets, problems = [], []
    for layer, transposed in layers.items():
        name = f"{layer}.weight"
        if name in ignored:
            continue
        if name not in keys:
            problems.append(f"{name}  not stored as one tensor of the checkpoint")
            continue
        entry = checkpoint.tensors[keys[name]]
        if entry.dtype not in DTYPES:
            problems.append(f"{name}  stored as {entry.dtype or 'a dtype that is not full precision'}")
        elif len(entry.shape) != 2:
            problems.append(f"{name}  shape {entry.shape} is not a matrix")
        else:
            shape = (entry.shape[1], entry.shape[0]) if transposed else (entry.shape[0], entry.shape[1])
            targets.append(Target(name, entry.key, shape, entry.dtype, _coarser(entry.dtype, config.dtype), transposed))
    if problems:
        raise UnguardableError(
            f"{len(problems)} tensors cannot be guarded on grid {format}",
            details=problems,
            remedy="Leave them out with --ignore; they will be listed as unguarded and the run will exit 3.",
        )
    return Plan(checkpoint, format, tuple(targets), tuple(sorted(ignored)))


def _coarser(stored: torch.dtype, configured: torch.dtype | None) -> torch.dtype:
    if configured in DTYPES and torch.finfo(configured).eps > torch.finfo(stored).eps:
        return configured
    return stored


def matching(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The target names that the user's patterns match.

    Raises:
        UsageError: A pattern is malformed or matches nothing.
    """
    matched: set[str] = set()
    for pattern in patterns:
        try:
            regex = re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
        except re.error as error:
            raise UsageError(f"--ignore {pattern!r} is not a regular expression: {error}") from error
        found = {name for name in names if regex.match(name) or regex.match(name.removesuffix(".weight"))}
        if not found:
            raise UsageError(
                f"--ignore {pattern!r} matches none of {len(names)} target tensors",
                remedy=f"A target's name: {names[0]}",
            )
        matched |= found
    return matched
