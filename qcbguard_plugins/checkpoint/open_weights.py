"""Open whatever holds weights: a folder, a safetensors file or a GGUF file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcbguard_plugins.checkpoint.hub import display_name, local_model
from qcbguard_plugins.checkpoint.loaded_files import passed_over, remote_model_classes
from qcbguard_plugins.checkpoint.reader import Checkpoint, open_checkpoint, read_header
from qcbguard_plugins.checkpoint.weight_source import SourceTensor, WeightSource, is_target, may_be_target
from qcbguard_plugins.errors import CheckpointError, UsageError

# Layer kinds that GPT-2's family keeps as [in_features, out_features]. GPT-BigCode has the same names the usual way
# round.
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)\.weight$")
_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}


def open_weights(path: Path | str) -> WeightSource:
    """Open a model for reading.

    Args:
        path: A folder with ``config.json`` and safetensors files, a ``.safetensors`` file, a ``.gguf`` file, or the
            name of a model on the hub.

    Raises:
        UsageError: Nothing is there, or it is none of these.
        CheckpointError: It cannot be read safely, or holds no matrix that a quantizer would round.
    """
    path = local_model(path)
    if path.is_dir():
        source = replace(_from_safetensors(open_checkpoint(path)), passed_over=passed_over(path))
    elif not path.is_file():
        raise UsageError(f"{path} does not exist", remedy="Give a folder, a .safetensors file or a .gguf file.")
    elif path.suffix == ".safetensors":
        entries = {entry.key: entry for entry in read_header(path)}
        source = _from_safetensors(Checkpoint(path.parent, {}, (path.name,), entries), name=path.name)
    elif path.suffix == ".gguf":
        from qcbguard_plugins.checkpoint.gguf_source import open_gguf

        source = open_gguf(path)
    else:
        raise UsageError(f"{path.name} is neither a .safetensors nor a .gguf file", remedy="Pickles are never opened.")
    if not source.targets:
        raise CheckpointError(
            f"{source.name} holds no matrix that a stock quantizer would round ({source.num_others} other tensors)",
            remedy="Targets are matrices named *.weight that are not embeddings, norms, routers or the output layer.",
        )
    return source


def _from_safetensors(checkpoint: Checkpoint, name: str = "") -> WeightSource:
    conv1d = _stores_conv1d(checkpoint)
    wanted = may_be_target if remote_model_classes(checkpoint.config) else is_target
    entries = [entry for entry in checkpoint.tensors.values() if wanted(entry.key, entry.shape)]
    targets = [
        SourceTensor(entry.key, entry.shape, entry.dtype, conv1d and bool(_CONV1D.search(entry.key)))
        for entry in entries
    ]
    return WeightSource(
        name=name or display_name(checkpoint.path),
        path=checkpoint.path,
        kind="safetensors",
        targets=tuple(targets),
        num_others=len(checkpoint.tensors) - len(targets),
        largest_bytes=max((entry.num_bytes for entry in entries), default=0),
        _read=checkpoint.read,
    )


def _stores_conv1d(checkpoint: Checkpoint) -> bool:
    """By the configuration, else by the shape of a layer that widens its input."""
    model_type: Any = checkpoint.config.get("model_type")
    if isinstance(model_type, str):
        return model_type in _CONV1D_TYPES
    return any(
        len(entry.shape) == 2 and entry.shape[1] > entry.shape[0]
        for entry in checkpoint.tensors.values()
        if re.search(r"(c_fc|c_attn)\.weight$", entry.key)
    )
