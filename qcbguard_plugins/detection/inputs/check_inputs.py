"""Test a model's rounding errors along the inputs that its layers really read."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins._util.memory import budget_or_available
from qcbguard_plugins.backends.formats import backend_of, fitting_grid, versions
from qcbguard_plugins.checkpoint import Checkpoint, open_checkpoint
from qcbguard_plugins.checkpoint.open_weights import open_weights
from qcbguard_plugins.checkpoint.weight_source import SourceTensor, WeightSource
from qcbguard_plugins.detection.inputs.alignment import alignment
from qcbguard_plugins.detection.inputs.combination import DirectionResult, combine_directions
from qcbguard_plugins.detection.inputs.directions import DIRECTIONS, input_directions
from qcbguard_plugins.detection.inputs.report import DirectionEvidence, FormatInputs, InputReport, UntestedLayer
from qcbguard_plugins.detection.inputs.rounding_errors import rounding_errors
from qcbguard_plugins.detection.inputs.texts import gather_texts
from qcbguard_plugins.detection.weights.measure import layer_of, why_unreadable
from qcbguard_plugins.detection.weights.null_grids import draw_inflations, generator_for, reproduces, sample_rows
from qcbguard_plugins.detection.weights.scan import require_scipy
from qcbguard_plugins.detection.weights.thresholds import ON_GRID
from qcbguard_plugins.errors import CalibrationError, CheckpointError, UsageError
from qcbguard_plugins.grids import Grid

#: Largest corrected p-value of a finding.
ALPHA = 1e-3

#: Weights of one tensor that are tested; a larger tensor is represented by random rows.
MAX_WEIGHTS = 1 << 20

_NUM_NEIGHBOURS = 6
# Neighbours are read on half of the rows: they are averaged, so that this costs a tenth of the power and half the time.
_NEIGHBOUR_SHARE = 2
# Deviations from which on one of eight directions is a finding, for what the report says of its own power.
_VISIBLE_DEVIATIONS = 4.2
_FLOAT32_BYTES = 4


@dataclass
class _Measured:
    """Alignments of the layers on one format, a row a layer."""

    names: list[str] = field(default_factory=list)
    ratios: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    neighbour_variances: list[Tensor] = field(default_factory=list)
    num_on_grid: int = 0


def check_inputs(
    model_dir: Path | str,
    formats: Sequence[str],
    *,
    prompts_path: Path | None = None,
    seed: int | None = None,
    max_weights: int = MAX_WEIGHTS,
    progress: Callable[[int], object] | None = None,
    budget_bytes: int | None = None,
) -> InputReport:
    """Read some texts with a model, and ask whether rounding acts on what its layers read more than chance does.

    Nothing is generated. The model is run once in full precision, block by block where it does not fit into memory; no
    code of its own is run.

    Args:
        model_dir: Folder of a full-precision model with its tokenizer.
        formats: Formats to test for.
        prompts_path: Prompts of the user's, besides the built-in ones; an attacker cannot have trained against them.
        seed: Seed of the neighbouring grids and random rows; a fresh one by default.
        max_weights: Weights of one tensor that are tested; larger ones are represented by random rows.
        progress: Called with the number of weights of each tensor when it is done.
        budget_bytes: What the process may hold in memory; by default what the machine has left.

    Returns:
        The report.

    Raises:
        UsageError: A format is unknown, the path is not a folder, or the prompts cannot be read.
        CheckpointError: The folder is no model that can be run, or has no tokenizer.
        MissingDependencyError: SciPy or transformers is not installed.
    """
    from qcbguard_plugins.models.loading import require_tokenizer

    start = time.monotonic()
    require_scipy()
    if not formats:
        raise UsageError("no format to test for")
    grids = {name: backend_of(name).representative_grid(name) for name in dict.fromkeys(formats)}
    seed = secrets.randbits(63) if seed is None else seed
    model_dir = _folder(model_dir)
    source = open_weights(model_dir)
    tokenizer = require_tokenizer(
        model_dir, remedy="Put the tokenizer files beside the model; 'qcbguard scan' needs none."
    )
    model, names = _model(model_dir, source, budget_bytes)
    texts = gather_texts(tokenizer, prompts_path, _longest(model.config))
    try:
        directions = input_directions(model, sorted(names), texts)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # What a class of transformers raises when it is run on text alone is its own affair.
        raise CheckpointError(
            f"{type(model).__name__} cannot be run on text alone: {type(error).__name__}: {error}",
            remedy="Its weights can be tested: qcbguard scan.",
        ) from error
    del model
    measured = {name: _Measured() for name in grids}
    skipped = []
    for target in source.targets:
        layer = target.name.removesuffix(".weight")
        name = next((own for own, key in names.items() if key == target.name), layer)
        reason = target.unusable or ("" if name in directions else "no input reached it")
        if not reason:
            reason = _measure(source, target, directions[name], grids, seed, max_weights, measured)
        if reason:
            skipped.append(UntestedLayer(name=target.name, reason=reason))
        if progress is not None:
            progress(target.num_weights)
    found = tuple(_judge(name, part, len(grids)) for name, part in measured.items())
    attacked = any(part.attacked for part in found)
    return InputReport(
        versions=versions(),
        model=source.name,
        verdict="attacked" if attacked else "incomplete" if skipped else "clean",
        p_value=min(part.p_value for part in found),
        alpha=ALPHA,
        seed=seed,
        own_prompts=prompts_path is not None,
        num_texts=len(texts),
        num_tokens=sum(len(text.ids) for text in texts),
        formats=found,
        skipped=tuple(skipped),
        elapsed_s=time.monotonic() - start,
    )


def _folder(model_dir: Path | str) -> Path:
    model_dir = Path(model_dir)
    if model_dir.is_dir():
        return model_dir
    if model_dir.exists():
        raise UsageError(
            f"{model_dir.name} is a file; its layers' inputs need a model that can be run",
            remedy="Give the folder with config.json and the tokenizer; 'qcbguard scan' reads single files.",
        )
    raise UsageError(f"{model_dir} does not exist", remedy="Give the folder of a model.")


def _longest(config: Any) -> int:
    """How many tokens a model can read at once."""
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([limit for limit in limits if isinstance(limit, int) and limit > 0], default=1 << 20)


def _model(model_dir: Path, source: WeightSource, budget_bytes: int | None) -> tuple[Any, dict[str, str]]:
    """The model, and its layers' names with those of their tensors in the file."""
    from qcbguard_plugins.models.loading import load_full_precision
    from qcbguard_plugins.models.skeleton import build_skeleton, load_config, parameter_keys

    checkpoint = open_checkpoint(model_dir)
    keys = parameter_keys(build_skeleton(load_config(model_dir)), checkpoint.tensors)
    stored = {target.name for target in source.targets}
    names = {
        name.removesuffix(".weight"): key for name, key in keys.items() if key in stored and name.endswith(".weight")
    }
    num_weights = sum(_size(entry.shape) for entry in checkpoint.tensors.values())
    if 2 * _FLOAT32_BYTES * num_weights > budget_or_available(budget_bytes):
        return _streamed(checkpoint, sorted(names)), names
    return load_full_precision(model_dir, torch.float32), names


def _streamed(checkpoint: Checkpoint, layers: list[str]) -> Any:
    from qcbguard_plugins.models.streaming import StreamedWeights

    try:
        return StreamedWeights(checkpoint, torch.float32, layers).model
    except CalibrationError as error:
        raise CheckpointError(error.summary, remedy="Raise --max-memory so that the whole model fits.") from error


def _size(shape: Sequence[int]) -> int:
    return int(torch.tensor(shape).prod()) if shape else 1


def _measure(
    source: WeightSource,
    target: SourceTensor,
    directions: Tensor,
    grids: dict[str, Grid],
    seed: int,
    max_weights: int,
    measured: dict[str, _Measured],
) -> str:
    """Measure one tensor on every grid.

    Returns:
        Why it cannot be tested, or an empty string.
    """
    weight = source.read(target)
    reason = why_unreadable(weight, grids)
    if reason:
        return reason
    if directions.shape[0] != weight.shape[1]:
        return f"its rows have {weight.shape[1]} weights, and its inputs {directions.shape[0]} entries"
    inflations = draw_inflations(generator_for(seed, "neighbouring grids"), _NUM_NEIGHBOURS)
    for name, family in grids.items():
        grid = fitting_grid(family, (weight.shape[0], weight.shape[1]))
        assert grid is not None, "looked at above"
        generator = generator_for(seed, target.name)
        part = sample_rows(weight, grid, max_weights, generator)
        if reproduces(sample_rows(part, grid, max_weights // 8, generator), grid) >= ON_GRID:
            measured[name].num_on_grid += 1
            continue
        own = alignment(next(rounding_errors(part, grid, ())), directions)
        half = sample_rows(part, grid, part.numel() // _NEIGHBOUR_SHARE, generator)
        errors = rounding_errors(half, grid, inflations)
        next(errors)
        neighbours = [alignment(error, directions) for error in errors]
        measured[name].names.append(target.name)
        measured[name].ratios.append(torch.stack([own.ratio, *(near.ratio for near in neighbours)]))
        measured[name].variances.append(own.relative_variance)
        measured[name].neighbour_variances.append(neighbours[0].relative_variance)
    return ""


def _judge(name: str, measured: _Measured, num_formats: int) -> FormatInputs:
    if not measured.names:
        return FormatInputs(
            format=name,
            attacked=False,
            p_value=1.0,
            excess=0.0,
            direction="",
            smallest_visible=0.0,
            num_layers=0,
            num_on_grid=measured.num_on_grid,
            directions=(),
        )
    variances = torch.stack(measured.variances)
    layers = [layer_of(tensor) for tensor in measured.names]
    results = combine_directions(
        torch.stack(measured.ratios),
        variances,
        torch.stack(measured.neighbour_variances),
        [-1 if layer is None else layer for layer in layers],
    )
    numbers = sorted({layer for layer in layers if layer is not None})
    p_values = [min(1.0, num_formats * len(results) * result.p_value) for result in results]
    order = sorted(range(len(results)), key=lambda d: (p_values[d], -results[d].whole.deviations))
    strongest = results[order[0]].whole
    deviation = float(
        (1 / torch.where(torch.isfinite(variances), 1 / variances, 0.0).sum(0).clamp(min=1e-30)).sqrt().min()
    )
    return FormatInputs(
        format=name,
        attacked=p_values[order[0]] <= ALPHA,
        p_value=p_values[order[0]],
        excess=strongest.size,
        direction=DIRECTIONS[order[0]],
        smallest_visible=_VISIBLE_DEVIATIONS * deviation,
        num_layers=len(measured.names),
        num_on_grid=measured.num_on_grid,
        directions=tuple(_evidence(DIRECTIONS[d], result, numbers) for d, result in enumerate(results)),
    )


def _evidence(name: str, result: DirectionResult, numbers: list[int]) -> DirectionEvidence:
    worst = min(range(len(result.blocks)), key=lambda b: result.block_p[b], default=None)
    return DirectionEvidence(
        name=name,
        ratio=result.whole.ratio,
        neighbours=result.whole.neighbours,
        deviations=result.whole.deviations,
        p_value=result.whole.p_value,
        block=None if worst is None else numbers[worst],
        block_ratio=1.0 if worst is None else result.blocks[worst].ratio,
        block_p=1.0 if worst is None else result.block_p[worst],
    )
