"""What llama.cpp will make of a Hugging Face folder: names, types and order, before anything is converted.

The stock converter copies the matrices of the architectures below one to one. It reorders rows of some, the query and
key projections of Llama among them, and transposes those of GPT-2 into the usual form; every GGUF type works on rows,
so quantizing and reordering can change places.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcbguard_plugins.backends.base import Selection
from qcbguard_plugins.backends.ggml.dry_run import dry_run_types
from qcbguard_plugins.backends.ggml.imatrix import Imatrix, read_imatrix
from qcbguard_plugins.backends.ggml.options import OUTTYPES, GgufOptions
from qcbguard_plugins.backends.ggml.recipes import ModelShape, predict_types, resolve_recipe
from qcbguard_plugins.errors import MissingDependencyError, UnguardableError, UsageError
from qcbguard_plugins.grids.ggml_blocks import BLOCK_TYPES
from qcbguard_plugins.models.skeleton import transposed_parameters
from qcbguard_plugins.models.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' model types whose matrices the converter copies one to one, with llama.cpp's name of the architecture.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "phi3": "phi3", "olmo2": "olmo2", "stablelm": "stablelm", "starcoder2": "starcoder2",
    "gpt2": "gpt2",
}  # fmt: skip


def folder_targets(skeleton: PreTrainedModel, recipe: str, options: GgufOptions) -> Selection:
    """Find out how llama.cpp will quantize a folder.

    Args:
        skeleton: The model without weights.
        recipe: What ``llama-quantize`` will be given.
        options: The user's options.

    Raises:
        UsageError: The architecture is not one whose converter copies matrices one to one; or a flag is wrong.
        UnguardableError: A matrix has no name in GGUF, or a type that cannot be guarded.
        MissingDependencyError: The gguf package is missing.
    """
    recipe, config = resolve_recipe(recipe), skeleton.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None or getattr(config, "num_local_experts", None):
        raise UsageError(
            f"llama.cpp's converter does not copy the matrices of a {config.model_type} model one to one",
            remedy="Convert it first, then guard the file: qcbguard gguf MODEL.gguf GUARDED.gguf --for " + recipe,
        )
    heads = config.num_attention_heads
    model = ModelShape(architecture, config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", heads))
    tied, transposed = bool(getattr(config, "tie_word_embeddings", False)), transposed_parameters(skeleton)
    matrices = {
        name: (weight.shape[::-1] if name in transposed else weight.shape)
        for name, weight in skeleton.named_parameters(remove_duplicate=False)
        if weight.dim() > 1 and not (tied and name == "lm_head.weight")
    }
    names = gguf_names(architecture, model.num_layers, matrices)
    types, types_from = _types({names[name]: shape for name, shape in matrices.items()}, recipe, model, config, options)
    quantized = {name: types[gguf] for name, gguf in names.items() if gguf in types}
    problems = [f"{name}  {type_name}" for name, type_name in quantized.items() if type_name not in BLOCK_TYPES]
    if problems:
        raise UnguardableError(f"{len(problems)} tensors get types that cannot be guarded", details=problems)
    imatrix = Imatrix() if options.imatrix_path is None else read_imatrix(options.imatrix_path)
    targets = {}
    for name, type_name in quantized.items():
        rows, columns = matrices[name]
        importance = imatrix.of(names[name], 1, columns)
        is_table = names[name] == "token_embd.weight"
        targets[name] = Target(
            name=name,
            shape=(rows, columns),
            dtype=skeleton.get_parameter(name).dtype,
            grids=(options.grid(type_name, importance=None if importance is None else importance[0]),),
            transposed=name in transposed,
            calibrated_by="lm_head" if is_table and tied else "",
            has_inputs=tied or not is_table,
            # The converter reads the stored weights, whatever dtype transformers would load.
            read_dtype=OUTTYPES[options.outtype],
            stored_name=names[name],
        )
    facts = {"types_from": types_from, "outtype": options.outtype}
    if imatrix.digest:
        facts["imatrix_sha256"] = imatrix.digest
    return Selection(targets, facts)


def gguf_names(architecture: str, num_layers: int, names: Iterable[str]) -> dict[str, str]:
    """GGUF names of parameters, from gguf-py's table.

    Raises:
        UnguardableError: A parameter is not in the table.
        MissingDependencyError: gguf-py is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            "the gguf package is needed for llama.cpp's tensor names", remedy="pip install 'qcbguard-plugins[gguf]'"
        ) from error
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(number, num_layers)
    mapped = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = [name for name, found in mapped.items() if found is None]
    if unknown:
        raise UnguardableError(f"{len(unknown)} tensors have no name in GGUF", details=unknown)
    return {name: str(found) for name, found in mapped.items()}


def _types(
    shapes: dict[str, tuple[int, ...]], recipe: str, model: ModelShape, config: Any, options: GgufOptions
) -> tuple[dict[str, str], str]:
    binary = options.find_binary()
    predicted = predict_types(shapes.items(), recipe, model, has_imatrix=options.imatrix_path is not None)
    types, types_from = predicted, "predicted from the rules of llama.cpp of October 2026"
    if binary is not None:
        with tempfile.TemporaryDirectory() as folder:
            skeleton = Path(folder) / "skeleton.gguf"
            write_skeleton(skeleton, shapes, model, config)
            types, version = dry_run_types(binary, skeleton, recipe, options)
        types_from = f"llama-quantize --dry-run {' '.join(options.quantize_args)}".strip() + f", version {version}"
    elif options.quantize_args:
        raise UsageError(
            f"the flags {' '.join(options.quantize_args)} need llama-quantize, and none was found",
            remedy="Name the binary with --llama-quantize.",
        )
    return {name: type_name for name, type_name in types.items() if type_name not in ("F16", "BF16", "F32")}, types_from


def write_skeleton(path: Path, shapes: dict[str, tuple[int, ...]], model: ModelShape, config: Any) -> None:
    """A GGUF file with the shapes of the model and no weights: its tensors are a hole in the file.

    ``llama-quantize --dry-run`` reads headers, and asks for a model whose header is complete.
    """
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(getattr(config, "max_position_embeddings", 2048))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(getattr(config, "norm_epsilon", 1e-5))
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // model.num_heads)
    writer.add_sliding_window(getattr(config, "sliding_window", None) or 4096)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    num_bytes = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        writer.add_tensor_info(name, list(shape), np.dtype(np.float32), size)
        num_bytes += size + 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + num_bytes)
