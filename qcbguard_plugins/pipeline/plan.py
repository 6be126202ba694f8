"""Which tensors the stock quantizers will read, found out from headers alone, and the grids of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcbguard_plugins._util.dtypes import DTYPES
from qcbguard_plugins.backends.base import Backend, Selection
from qcbguard_plugins.backends.formats import backend_of
from qcbguard_plugins.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from qcbguard_plugins.checkpoint.hub import display_name, local_model
from qcbguard_plugins.checkpoint.uncovered import UncoveredTensor
from qcbguard_plugins.errors import CheckpointError, UnguardableError, UsageError
from qcbguard_plugins.models.coverage import uncovered_tensors
from qcbguard_plugins.models.skeleton import build_skeleton, load_config, parameter_keys
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.ignore import matching

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        source: Name of what is guarded, for the record.
        formats: The formats as the user spelled them.
        targets: The weights that will be guarded, each with its grids.
        ignored: Names of targets that the user leaves unguarded.
        backends: Backends with settings of the user's, for formats whose defaults will not do.
        facts: What the plan depends on besides the source, for the record.
        uncovered: Tensors that these quantizers leave alone and another of the format would take.
    """

    source: str
    formats: tuple[str, ...]
    targets: tuple[Target, ...]
    ignored: tuple[str, ...] = ()
    backends: tuple[Backend, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    uncovered: tuple[UncoveredTensor, ...] = ()

    @property
    def num_weights(self) -> int:
        return sum(target.num_weights for target in self.targets)

    def all_facts(self) -> dict[str, str]:
        """What the plan depends on, and who answered for the stock quantizers."""
        asked = dict.fromkeys(backend_of(name, self.backends) for name in self.formats)
        return self.facts | {name: text for backend in asked for name, text in backend.facts(self.targets).items()}


@dataclass(frozen=True)
class FolderPlan(Plan):
    """What a run will do to a checkpoint folder.

    Attributes:
        checkpoint: The folder.
    """

    checkpoint: Checkpoint = field(kw_only=True)


def as_formats(formats: Sequence[str] | str) -> tuple[str, ...]:
    """Formats as a tuple; one string may name several with commas, as the command line does.

    Raises:
        UsageError: There is none, one stands twice, or two are recipes of llama.cpp, which a folder cannot serve both.
    """
    parts = formats.split(",") if isinstance(formats, str) else formats
    names = tuple(part.strip() for part in parts)
    if not names:
        raise UsageError("no format to guard for")
    if len(set(names)) < len(names) or sum(name.startswith("gguf:") for name in names) > 1:
        raise UsageError(
            f"{','.join(names)!r} names a format twice, or two GGUF recipes", remedy="Guard once for each of them."
        )
    return names


def make_plan(
    source: Path | str,
    formats: Sequence[str] | str,
    *,
    ignore: Sequence[str] = (),
    backends: Iterable[Backend] = (),
) -> FolderPlan:
    """List every tensor of a folder that the stock quantizers will read, and how each will be guarded.

    Args:
        source: Folder of a full-precision checkpoint, or its name on the hub.
        formats: Such as ``nf4``, ``int8``, ``gptq-w4g128`` or ``gguf:Q4_K_M``, one or several.
        ignore: Patterns of parameter names to leave unguarded: globs, or regular expressions after ``re:``.
        backends: Backends with settings of the user's, such as ``Ggml(GgufOptions(outtype="f16"))``.

    Raises:
        CheckpointError: The folder cannot be read.
        UsageError: A format is unknown, or a pattern matches no target.
        UnguardableError: Targets cannot be guarded: their dtype, or a tensor that transformers assembles on loading.
    """
    formats, backends = as_formats(formats), tuple(backends)
    for name in formats:
        backend_of(name, backends).representative_grid(name)
    checkpoint = open_checkpoint(local_model(source))
    config = load_config(checkpoint.path)
    _require_stored_layers(config, checkpoint)
    skeleton = build_skeleton(config)
    keys = parameter_keys(skeleton, checkpoint.tensors)
    uncovered = uncovered_tensors(skeleton, checkpoint)
    selection = select_targets(skeleton, formats, backends)
    name = display_name(checkpoint.path)
    if not selection.targets:
        raise UnguardableError(f"{name} has no layer that {', '.join(formats)} quantizes")
    ignored = matching(list(selection.targets), ignore)
    targets, problems = [], []
    for target in selection.targets.values():
        if target.name in ignored:
            continue
        entry = checkpoint.tensors.get(keys.get(target.name, ""))
        problem = _problem(target, entry)
        if problem or entry is None or entry.dtype is None:
            problems.append(problem)
        else:
            read_dtype = coarser(entry.dtype, target.read_dtype or config.dtype)
            targets.append(replace(target, key=entry.key, dtype=entry.dtype, read_dtype=read_dtype))
    if problems:
        raise UnguardableError(
            f"{len(problems)} tensors cannot be guarded on grid {', '.join(formats)}",
            details=problems,
            remedy="Leave them out with --ignore; they will be listed as unguarded and the run will exit 3.",
        )
    covered = {keys[name] for name in selection.targets if name in keys}
    return FolderPlan(
        name,
        formats,
        tuple(targets),
        tuple(sorted(ignored)),
        backends,
        selection.facts,
        tuple(tensor for tensor in uncovered if tensor.key not in covered),
        checkpoint=checkpoint,
    )


def select_targets(skeleton: PreTrainedModel, formats: Sequence[str], backends: Iterable[Backend] = ()) -> Selection:
    """Ask each backend what it will read of a model, and put the answers together.

    Args:
        skeleton: The model without weights; it is changed.
        formats: The formats.
        backends: Backends with settings of the user's.

    Raises:
        UsageError, UnguardableError: See :meth:`~qcbguard_plugins.backends.base.Backend.targets`.
    """
    targets: dict[str, Target] = {}
    facts: dict[str, str] = {}
    config = skeleton.config
    # What reads the checkpoint's files comes first: it says in which dtype.
    for number, name in enumerate(sorted(formats, key=lambda name: not name.startswith("gguf:"))):
        selection = backend_of(name, backends).targets(skeleton if number == 0 else build_skeleton(config), name)
        facts |= selection.facts
        for parameter, target in selection.targets.items():
            first = targets.get(parameter)
            targets[parameter] = target if first is None else replace(first, grids=first.grids + target.grids)
    return Selection(targets, facts)


def coarser(stored: torch.dtype, configured: torch.dtype | None) -> torch.dtype:
    """The dtype in which a weight is read: the configured one where it is coarser. A weight planned on the coarser grid
    is stored as planned from both.
    """
    if configured in DTYPES and torch.finfo(configured).eps > torch.finfo(stored).eps:
        return configured
    return stored


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


def _problem(target: Target, entry: TensorEntry | None) -> str:
    """Why a tensor cannot be guarded; empty where it can."""
    if entry is None:
        return f"{target.name}  not stored as one tensor of the checkpoint"
    if entry.dtype not in DTYPES:
        return f"{target.name}  stored as {entry.dtype or 'a dtype that is not full precision'}"
    if len(entry.shape) != 2:
        return f"{target.name}  shape {entry.shape} is not a matrix"
    if entry.shape != target.stored_shape:
        return f"{target.name}  stored with shape {entry.shape}, config.json says {target.stored_shape}"
    unfit = next((problem for grid in target.grids if (problem := grid.fits(target.shape))), "")
    return f"{target.name}  {unfit}" if unfit else ""
