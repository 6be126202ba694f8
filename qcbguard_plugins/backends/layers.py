"""Which layers a stock quantizer takes, for any format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from qcbguard_plugins.backends.transformers import build_skeleton
from qcbguard_plugins.errors import UnguardableError
from qcbguard_plugins.grids import AffineGrid, IntegerGrid, get_grid
from qcbguard_plugins.grids.toolchains import toolchain_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TakenLayer:
    """A layer that a quantizer takes.

    Attributes:
        format: The format that its weight gets, which may be another than that of the run.
        transposed: True where the checkpoint stores ``[in_features, out_features]`` (GPT-2's Conv1D).
        inputs_of: See :class:`~qcbguard_plugins.model.Layer`.
    """

    format: str
    transposed: bool = False
    inputs_of: str | None = ""


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


def block_layers(model: PreTrainedModel) -> dict[str, bool]:
    """Every linear layer of the decoder blocks, which is what GPTQ takes; not the embeddings and not the output head.

    Raises:
        UnguardableError: The model has no blocks, or keeps the experts of a block in one parameter.
    """
    from transformers.pytorch_utils import Conv1D

    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UnguardableError(f"{type(model).__name__} has no decoder blocks")
    blocks = max(lists, key=lambda name: (len(model.get_submodule(name)), -len(name)))
    _refuse_fused(model, blocks)
    return {
        f"{blocks}.{name}": isinstance(module, Conv1D)
        for name, module in model.get_submodule(blocks).named_modules()
        # Routers and the like are subclasses, which quantizers leave alone.
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Every ``nn.Linear`` but the output head, which is what most weight-only quantizers take by default."""
    _refuse_fused(model, "")
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def exported_layers(model: PreTrainedModel, format: str) -> dict[str, TakenLayer]:
    """What ONNX Runtime and OpenVINO take of an exported model: every matrix, the tables and the output head included.

    ONNX Runtime gives a table one scale, and a zero point beside int8 weights. OpenVINO keeps tables and the head at
    8 bits, asymmetric, where the rest gets fewer. A head that is tied to the table is stored once, as the table.

    Raises:
        UnguardableError: The model keeps the experts of a block in one parameter.
    """
    from transformers.pytorch_utils import Conv1D

    _refuse_fused(model, "")
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
            inputs_of = _name_of(model, head) if module is table and tied else None
            taken[name] = TakenLayer(table_format, inputs_of=inputs_of)
        elif module is head:
            if not tied:
                taken[name] = TakenLayer(head_format)
        elif isinstance(module, (nn.Linear, Conv1D)):
            taken[name] = TakenLayer(format, isinstance(module, Conv1D))
    return taken


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _refuse_fused(model: PreTrainedModel, inside: str) -> None:
    """Refuse parameters that hold several matrices.

    Args:
        model: The model.
        inside: Name of the module to look at; all of the model if empty.
    """
    fused = [
        f"{name}  {tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if parameter.dim() > 2 and name.startswith(inside)
    ]
    if fused:
        raise UnguardableError(
            f"{len(fused)} parameters hold several matrices each, which quantizers take apart in ways of their own",
            details=fused,
            remedy="Mixture-of-experts models cannot be guarded for this format.",
        )
