"""What the package needs from transformers: a model's skeleton, its weights, its tokenizer, its names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qcbguard_plugins.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OLDEST = (4, 57)


def require_transformers() -> Any:
    """The transformers module.

    Raises:
        MissingDependencyError: It is missing, or older than 4.57, the last before 5.0.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"transformers is needed: {error}", remedy="pip install 'qcbguard-plugins[hf]'"
        ) from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
        raise MissingDependencyError(
            f"transformers {transformers.__version__} is too old", remedy="Install 5.0 or newer, or 4.57."
        )
    return transformers


def require_hooks() -> None:
    """Check for the hooks that a guard inside ``from_pretrained`` stands on.

    Raises:
        MissingDependencyError: transformers is older than 5.0.
    """
    version = require_transformers().__version__
    if version.startswith("4."):
        raise MissingDependencyError(
            f"transformers {version} cannot be guarded in flight, 5.0 or newer is needed",
            remedy="Guard the checkpoint into a folder with 'qcbguard guard'; that works here.",
        )


def model_class(config: Any) -> Any:
    """The class that the configuration names, if it is one of transformers' own; else the causal language model."""
    transformers = require_transformers()
    for name in getattr(config, "architectures", None) or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    try:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise CheckpointError(f"transformers has no causal language model for {config.model_type!r}") from error


def load_config(model_dir: Path) -> Any:
    """Read ``config.json``; code that comes with a model is never run.

    Raises:
        CheckpointError: transformers does not know the model, or it needs remote code.
    """
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config is input: whatever it breaks in transformers is an error about the folder
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model_dir.name}/config.json is not a model that transformers can build: {first_line}"
        ) from error
    _require_same_positions(config, model_dir)
    return config


def _require_same_positions(config: Any, model_dir: Path) -> None:
    """Refuse a folder whose rotary embeddings transformers 4 would overlook: 5 stores them under another name.

    Raises:
        CheckpointError: The model would be run with other positions than it was made with.
    """
    stored = getattr(config, "rope_parameters", None)
    if not isinstance(stored, dict) or not require_transformers().__version__.startswith("4."):
        return
    theta = stored.get("rope_theta")
    if stored.get("rope_type", "default") != "default" or theta != getattr(config, "rope_theta", theta):
        raise CheckpointError(
            f"{model_dir.name} was saved by transformers 5, and version 4 would ignore its rope_parameters",
            remedy="Put rope_theta and rope_scaling into config.json, as version 4 has them.",
        )


def build_skeleton(config: Any) -> PreTrainedModel:
    """The model without its weights: every parameter on the meta device.

    Weights that are tied later are apart, as they are when transformers asks a quantizer for its layers: which
    parameter is the last one, and so left out by bitsandbytes, depends on it.

    Raises:
        CheckpointError: transformers cannot build it from this configuration.
    """
    config = copy.deepcopy(config)
    cls = model_class(config)
    try:
        with torch.device("meta"), _untied():
            skeleton: PreTrainedModel = cls(config)
    except Exception as error:  # as above: a value that the configuration takes may break in the model
        raise CheckpointError(
            f"config.json describes no {cls.__name__} that transformers can build: {type(error).__name__}: {error}"
        ) from error
    return skeleton


def _untied() -> AbstractContextManager[Any]:
    """The context of ``from_pretrained`` in which a model does not tie its weights."""
    if require_transformers().__version__.startswith("4."):
        from transformers.modeling_utils import no_init_weights

        return cast("AbstractContextManager[Any]", no_init_weights())
    from transformers import initialization

    return cast("AbstractContextManager[Any]", initialization.no_tie_weights())


def transposed_parameters(skeleton: PreTrainedModel) -> set[str]:
    """Weights that are stored as ``[in_features, out_features]``: those of GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Conv1D)}


def parameter_keys(skeleton: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Map parameter names of a model to the names of their tensors in a checkpoint, as transformers would load them.

    Only tensors that become one parameter unchanged are mapped, and not those that transformers merges or splits.
    """
    return {name: key for key, (name, is_whole) in loaded_names(skeleton, keys).items() if is_whole}


def loaded_names(skeleton: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """The parameter that transformers would load each tensor of a checkpoint into, whether there is one or not.

    Returns:
        By name in the checkpoint: the parameter's name, and true where the tensor becomes that parameter unchanged.
    """
    parameters = skeleton.state_dict()
    if require_transformers().__version__.startswith("4."):
        return {key: _unconverted_name(key, skeleton.base_model_prefix, parameters) for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(skeleton)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    names = {}
    for key in keys:
        name, merged = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, parameters)
        names[key] = (name, merged is None)
    return names


def _unconverted_name(key: str, base_model_prefix: str, parameters: Mapping[str, Any]) -> tuple[str, bool]:
    """The same for transformers 4, which loads tensors under their own names, with or without the model's prefix."""
    prefix = f"{base_model_prefix}."
    for name in (key, prefix + key, key.removeprefix(prefix)):
        if name in parameters:
            return name, True
    return key, False
