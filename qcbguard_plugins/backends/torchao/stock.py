"""The stock quantizer itself: its configuration as a format, and the codes that it stores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcbguard_plugins.errors import MissingDependencyError, UnguardableError
from qcbguard_plugins.models.skeleton import require_transformers

_SUPPORTED = (
    "Int8WeightOnlyConfig(), and IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32, 64 or 128))"
)


def require_torchao() -> Any:
    """The torchao.quantization module.

    Raises:
        MissingDependencyError: torchao or transformers is missing.
    """
    require_transformers()
    try:
        import torchao.quantization
    except ImportError as error:
        raise MissingDependencyError(
            f"torchao is needed: {error}", remedy="pip install 'qcbguard-plugins[torchao]'"
        ) from error
    return torchao.quantization


def format_of(config: Any) -> str:
    """The format that a ``TorchAoConfig`` stands for.

    Raises:
        UnguardableError: It asks for a quantization that has no grid here.
    """
    quantization = require_torchao()
    if config.include_input_output_embeddings:
        raise UnguardableError(
            "include_input_output_embeddings=True quantizes tables that would pass unguarded", remedy="Leave it out."
        )
    kind = config.quant_type
    if isinstance(kind, quantization.Int8WeightOnlyConfig) and isinstance(kind.granularity, quantization.PerRow):
        return "torchao:int8"
    if (
        isinstance(kind, quantization.IntxWeightOnlyConfig)
        and str(kind.weight_dtype) == "torch.int4"
        and isinstance(kind.granularity, quantization.PerGroup)
        and kind.mapping_type.name == "SYMMETRIC"
        and kind.scale_dtype is None
        and kind.intx_choose_qparams_algorithm.name == "AFFINE"
    ):
        return f"torchao:int4-g{kind.granularity.group_size}"
    raise UnguardableError(f"{kind} has no grid here", remedy=f"Weight-only quantization that has one: {_SUPPORTED}.")


def parameter_codes(parameter: Any, num_levels: int) -> Tensor:
    """The codes of a quantized parameter: uint8, 0 for the lowest level."""
    codes: Tensor = parameter.qdata
    return (codes.to(torch.int16) + num_levels // 2).to(torch.uint8)


def is_quantized(parameter: Any) -> bool:
    """True for a parameter that torchao has quantized."""
    return hasattr(parameter, "qdata")
