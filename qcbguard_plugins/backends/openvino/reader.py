"""Read the integer weights of a model that OpenVINO's weight compression (NNCF) wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcbguard_plugins.errors import CheckpointError, MissingDependencyError

MODEL_FILE = "openvino_model.xml"
# The exporter names weights by module; those of 16-bit checkpoints get the second ending.
_ENDINGS = (".weight", "._openvino_orig_weight")
_NUM_BITS = {"u8": 8, "i8": 8, "u4": 4, "i4": 4}


def openvino_codes(folder: Path) -> dict[str, Tensor]:
    """The codes of every quantized matrix, by the dotted name of its layer.

    Args:
        folder: What ``optimum-cli export openvino`` wrote.

    Returns:
        uint8 ``[out_features, in_features]``, 0 for the lowest level.

    Raises:
        MissingDependencyError: OpenVINO is missing.
        CheckpointError: The folder cannot be read, or holds no quantized weight.
    """
    openvino = _require_openvino()
    try:
        model = openvino.Core().read_model(folder / MODEL_FILE)
    except Exception as error:  # whatever a malformed file breaks in OpenVINO is an error about the file
        raise CheckpointError(f"{folder.name}/{MODEL_FILE} cannot be read: {type(error).__name__}") from error
    found = {}
    for node in model.get_ops():
        layer = _layer(node.get_friendly_name())
        kind = node.get_element_type().get_type_name() if node.get_type_name() == "Constant" else ""
        if layer and kind in _NUM_BITS:
            found[layer] = _levels(node, kind)
    if not found:
        raise CheckpointError(
            f"{folder.name} holds no quantized weight", remedy="Export with --weight-format int8 or int4."
        )
    return found


def _layer(name: str) -> str:
    """The module that a constant belongs to; empty for one that is no weight."""
    for ending in _ENDINGS:
        if name.endswith(ending):
            return name.removeprefix("self.").removesuffix(ending)
    return ""


def _levels(node: Any, kind: str) -> Tensor:
    rows, *columns = list(node.get_output_shape(0))
    raw = np.asarray(node.get_data()).reshape(-1).view(np.uint8)
    if _NUM_BITS[kind] == 4:
        # Two codes a byte, the first in the lower half.
        raw = np.stack((raw & 0xF, raw >> 4), axis=1).reshape(-1)
    if kind.startswith("i"):
        raw = raw ^ np.uint8(1 << (_NUM_BITS[kind] - 1))
    return torch.from_numpy(raw[: rows * int(np.prod(columns))].copy()).view(rows, -1)


def _require_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenVINO is needed to read the folder: {error}", remedy="pip install 'qcbguard-plugins[openvino]'"
        ) from error
    return openvino
