"""Which tensors of a GGUF file ``llama-quantize`` will quantize, and to what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qcbguard_plugins.backends.ggml.backend import Ggml
from qcbguard_plugins.backends.ggml.dry_run import dry_run_types
from qcbguard_plugins.backends.ggml.imatrix import Imatrix, read_imatrix
from qcbguard_plugins.backends.ggml.options import GgufOptions
from qcbguard_plugins.backends.ggml.recipes import ModelShape, predict_types, resolve_recipe
from qcbguard_plugins.checkpoint.gguf_parts import require_whole
from qcbguard_plugins.checkpoint.gguf_reader import GgufFile, GgufTensor, open_gguf
from qcbguard_plugins.errors import CheckpointError, UnguardableError, UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.models.target import Target
from qcbguard_plugins.pipeline.ignore import matching
from qcbguard_plugins.pipeline.plan import Plan

# llama-quantize keeps these as they are: no block fits, or the user said so.
_UNQUANTIZED = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class GgufPlan(Plan):
    """What a run will do to a GGUF file.

    Attributes:
        file: The source.
        options: How the user quantizes.
    """

    file: GgufFile = field(kw_only=True)
    options: GgufOptions = field(kw_only=True)


def make_gguf_plan(
    source: Path | str, recipe: str, options: GgufOptions | None = None, *, ignore: Sequence[str] = ()
) -> GgufPlan:
    """List every tensor of a GGUF file that ``llama-quantize`` will quantize, and its type.

    Args:
        source: A GGUF file in full precision.
        recipe: What ``llama-quantize`` will be given, such as ``Q4_K_M``.
        options: The user's flags.
        ignore: Patterns of tensor names to leave unguarded: globs, or regular expressions after ``re:``.

    Raises:
        CheckpointError: The file cannot be read, or is quantized already.
        UsageError: The recipe or a flag is unknown, or a pattern matches nothing.
        UnguardableError: Targets get a type that cannot be guarded.
    """
    options = options or GgufOptions()
    recipe = resolve_recipe(recipe)
    file = open_gguf(source)
    require_full_precision(file)
    types, types_from = types_of(file, recipe, options)
    if not types:
        raise UnguardableError(f"{file.path.name} has no tensor that llama-quantize would quantize to {recipe}")
    ignored = matching(list(types), ignore)
    types = {name: type_name for name, type_name in types.items() if name not in ignored}
    problems = [f"{name}  {type_name}" for name, type_name in types.items() if type_name not in BLOCK_TYPES] + [
        f"{name}  stored as {file.tensors[name].type_name}" for name in types if file.tensors[name].dtype is None
    ]
    if problems:
        raise UnguardableError(
            f"{len(problems)} tensors of {file.path.name} cannot be guarded for {recipe}",
            details=problems,
            remedy="Leave them out with --ignore; they will be listed as unguarded and the run will exit 3.",
        )
    imatrix = Imatrix() if options.imatrix_path is None else read_imatrix(options.imatrix_path)
    facts = {"types_from": types_from} | ({"imatrix_sha256": imatrix.digest} if imatrix.digest else {})
    return GgufPlan(
        source=file.path.name,
        formats=(f"gguf:{recipe}",),
        targets=tuple(
            _target(tensor, types[name], imatrix, options) for name, tensor in file.tensors.items() if name in types
        ),
        ignored=tuple(sorted(ignored)),
        backends=(Ggml(options),),
        facts=facts,
        file=file,
        options=options,
    )


def _target(tensor: GgufTensor, type_name: str, imatrix: Imatrix, options: GgufOptions) -> Target:
    assert tensor.dtype is not None, "the plan has full-precision tensors only"
    *stack, rows, columns = tensor.shape
    num_matrices = math.prod(stack)
    importance = imatrix.of(tensor.name, num_matrices, columns)
    if importance is not None and not stack:
        importance = importance[0]
    return Target(
        name=tensor.name,
        shape=(rows, columns),
        dtype=tensor.dtype,
        grids=(options.grid(type_name, outtype=tensor.dtype, importance=importance),),
        key=tensor.name,
        num_matrices=num_matrices,
    )


def require_full_precision(file: GgufFile) -> None:
    """Refuse a file that is quantized already, or one part of several."""
    quantized = [f"{tensor.name}  {tensor.type_name}" for tensor in file.tensors.values() if tensor.is_quantized]
    if quantized:
        raise CheckpointError(
            f"{file.path.name} is quantized already, {len(quantized)} of its {len(file.tensors)} tensors",
            details=quantized[:3],
            remedy="Guard the F32, F16 or BF16 file that it was made from: what was hidden is in these codes already.",
        )
    require_whole(file)


def types_of(file: GgufFile, recipe: str, options: GgufOptions) -> tuple[dict[str, str], str]:
    """The type of every tensor that will be quantized, and where that is known from."""
    binary = options.find_binary()
    if binary is not None:
        types, version = dry_run_types(binary, file.path, recipe, options)
        flags = " ".join(options.quantize_args)
        types_from = f"llama-quantize --dry-run {flags}".strip() + f", version {version}"
    elif options.quantize_args:
        raise UsageError(
            f"the flags {' '.join(options.quantize_args)} need llama-quantize, and none was found",
            remedy="Name the binary with --llama-quantize.",
        )
    else:
        shapes = [(tensor.name, tensor.shape) for tensor in file.tensors.values()]
        has_imatrix = options.imatrix_path is not None
        types = predict_types(shapes, recipe, model_shape(file), has_imatrix=has_imatrix)
        types_from = "predicted from the rules of llama.cpp of October 2026"
    return {name: type_name for name, type_name in types.items() if type_name not in _UNQUANTIZED}, types_from


def model_shape(file: GgufFile) -> ModelShape:
    """What the rules of a recipe look at, from the metadata.

    Raises:
        CheckpointError: The metadata lacks the architecture or the number of blocks.
    """
    architecture = file.architecture

    def number(key: str, default: int) -> int:
        value = file.metadata.get(f"{architecture}.{key}", default)
        return value if isinstance(value, int) else default

    num_layers = number("block_count", 0)
    if not architecture or not num_layers:
        raise CheckpointError(
            f"{file.path.name} does not say its architecture and number of blocks, so its types cannot be predicted",
            remedy="Name llama-quantize with --llama-quantize; it is asked instead.",
        )
    heads = number("attention.head_count", 0)
    return ModelShape(
        architecture, num_layers, heads, number("attention.head_count_kv", heads), number("expert_count", 0)
    )
