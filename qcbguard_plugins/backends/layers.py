"""Which layers a stock quantizer takes, for any format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.grids import AffineGrid, IntegerGrid
from qcbguard_plugins.grids.presets import toolchain_of
from qcbguard_plugins.models.layers import TakenLayer, block_layers, linear_layers, name_of, refuse_fused
from qcbguard_plugins.models.skeleton import build_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantized_layers(format: str, config: Any) -> dict[str, TakenLayer]:
    """The layers of a model that the quantizer of a format takes, by dotted name.

    Args:
        format: Any format but a GGUF recipe.
        config: The model's configuration.

    Raises:
        UsageError: The format is unknown.
        UnguardableError: The quantizer takes weights of the model that cannot be guarded.
    """
    skeleton = build_skeleton(config)
    grid = get_grid(format)
    if isinstance(grid, AffineGrid):
        return {name: TakenLayer(format, transposed) for name, transposed in block_layers(skeleton).items()}
    if toolchain_of(format) in ("onnx", "openvino"):
        return exported_layers(skeleton, format)
    if isinstance(grid, IntegerGrid):
        return {name: TakenLayer(format) for name in linear_layers(skeleton)}
    from qcbguard_plugins.backends.bitsandbytes import stock

    layers = stock.quantized_layers(skeleton, stock.config_for(format))
    return {name: TakenLayer(format, transposed) for name, transposed in layers.items()}


def exported_layers(model: PreTrainedModel, format: str) -> dict[str, TakenLayer]:
    """What ONNX Runtime and OpenVINO take of an exported model: every matrix, the tables and the output head included.

    ONNX Runtime gives a table one scale, and a zero point beside int8 weights. OpenVINO keeps tables and the head at
    8 bits, asymmetric, where the rest gets fewer. A head that is tied to the table is stored once, as the table.

    Raises:
        UnguardableError: The model keeps the experts of a block in one parameter.
    """
    from transformers.pytorch_utils import Conv1D

    refuse_fused(model, "")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and bool(getattr(model.config, "tie_word_embeddings", False))
    onnx = toolchain_of(format) == "onnx"
    table_format = format
    if onnx:
        table_format = "onnx:uint8-tensor" if "uint8" in format else "onnx:uint8-table"
    head_format = format
    if not onnx and not format.startswith("openvino:int8"):
        table_format = head_format = "openvino:int8"
    taken = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            inputs_of = name_of(model, head) if module is table and tied else None
            taken[name] = TakenLayer(table_format, inputs_of=inputs_of)
        elif module is head:
            if not tied:
                taken[name] = TakenLayer(head_format)
        elif isinstance(module, (nn.Linear, Conv1D)):
            taken[name] = TakenLayer(format, isinstance(module, Conv1D))
    return taken
