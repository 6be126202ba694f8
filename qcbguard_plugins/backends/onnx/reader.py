"""Read the integer weights of a model that ONNX Runtime's dynamic quantization wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins.errors import CheckpointError, MissingDependencyError

_NARROW_INT8_ZERO = 127


def onnx_codes(path: Path) -> dict[str, Tensor]:
    """The codes of every quantized matrix, by the dotted name of its layer.

    The exporter names nodes after the modules that made them; the weights themselves lose their names. A table that the
    output head is tied to is one tensor, and appears once.

    Args:
        path: The ONNX file.

    Returns:
        uint8 ``[out_features, in_features]`` (``[num_rows, width]`` for a table), 0 for the lowest level.

    Raises:
        MissingDependencyError: The onnx package is missing.
        CheckpointError: The file cannot be read, or holds no quantized weight.
    """
    onnx = _require_onnx()
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # whatever a malformed file breaks in protobuf is an error about the file
        raise CheckpointError(f"{path.name} cannot be read as ONNX: {type(error).__name__}") from error
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, Tensor] = {}
    for node in graph.node:
        place = {"MatMulInteger": 1, "Gather": 0}.get(node.op_type)
        if place is None or node.input[place] not in stored:
            continue
        codes = _levels(onnx.numpy_helper.to_array(stored[node.input[place]]))
        if codes is not None and codes.dim() == 2:
            found[_layer(node.name)] = codes.T.contiguous() if node.op_type == "MatMulInteger" else codes
    if not found:
        raise CheckpointError(
            f"{path.name} holds no quantized weight",
            remedy="Give the file that 'optimum-cli onnxruntime quantize' wrote.",
        )
    return found


def _levels(array: Any) -> Tensor | None:
    """Codes as levels; ``None`` for an array that is no quantized weight."""
    if array.dtype == "uint8":
        return torch.from_numpy(array.copy())
    if array.dtype == "int8":
        return (torch.from_numpy(array.copy()).to(torch.int16) + _NARROW_INT8_ZERO).clamp_(min=0).to(torch.uint8)
    return None


def _layer(node_name: str) -> str:
    return node_name.strip("/").rpartition("/")[0].replace("/", ".")


def _require_onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingDependencyError(
            f"the onnx package is needed to read the file: {error}", remedy="pip install 'qcbguard-plugins[onnx]'"
        ) from error
    return onnx
