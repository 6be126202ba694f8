"""Integer grids of toolchains that round to nearest, by the names that users spell.

Each is compared with the real quantizer in ``tests/toolchains``.
"""

from __future__ import annotations

import re

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.integer import IntegerGrid, Span

TOOLCHAIN_FORMATS = {
    "torchao:int8": "torchao Int8WeightOnlyConfig, one scale a row",
    "torchao:int4-g128": "torchao IntxWeightOnlyConfig(torch.int4, PerGroup(128)); other groups alike",
    "onnx:int8": "ONNX Runtime dynamic quantization, int8, one scale a column of MatMul",
    "openvino:int8": "OpenVINO (NNCF) int8 weights, asymmetric, one scale a row; -sym",
    "openvino:int4-g128": "OpenVINO (NNCF) int4 weights, asymmetric; other groups alike, -sym",
    "compressed-tensors:w4-g128": "llm-compressor W4A16 by rounding to nearest; other groups alike, -asym",
    "quanto:int8": "Optimum Quanto int8 weights, one scale a row",
}

_FORMAT = re.compile(r"(torchao|onnx|openvino|compressed-tensors|quanto):(?:int|w)(\d)(?:-g(\d+))?(-sym|-asym)?")


def toolchain_of(name: str) -> str:
    """The part of a format before the colon; empty where there is none."""
    return name.partition(":")[0] if ":" in name else ""


def toolchain_grid(name: str) -> IntegerGrid | None:
    """The grid of a format; ``None`` where the name is no toolchain's.

    Raises:
        UsageError: The toolchain has no such format.
    """
    if toolchain_of(name) not in {toolchain_of(known) for known in TOOLCHAIN_FORMATS}:
        return None
    match = _FORMAT.fullmatch(name)
    grid = None if match is None else _grid(name, match[1], int(match[2]), match[3], match[4] or "")
    if grid is None:
        known = [format_name for format_name in TOOLCHAIN_FORMATS if toolchain_of(format_name) == toolchain_of(name)]
        raise UsageError(f"unknown format {name!r}", remedy=f"Formats: {', '.join(known)}.")
    return grid


def _grid(name: str, toolchain: str, num_bits: int, group: str | None, suffix: str) -> IntegerGrid | None:
    group_size = int(group) if group else None
    num_levels = 2**num_bits
    match (toolchain, num_bits, suffix):
        case ("torchao", 8, "") if group_size is None:
            return IntegerGrid(name, num_levels, None, Span.SYMMETRIC, reciprocal=True)
        case ("torchao", 4, "") if group_size is not None:
            return IntegerGrid(name, num_levels, group_size, Span.SYMMETRIC, reciprocal=True, native=True)
        case ("onnx", 8, "") if group_size is None:
            return IntegerGrid(name, num_levels - 1, None, Span.SYMMETRIC)
        case ("openvino", 8, "" | "-sym") if group_size is None:
            return IntegerGrid(name, num_levels, None, Span.SIGNED if suffix else Span.ASYMMETRIC)
        case ("openvino", 4, "" | "-sym") if group_size is not None:
            return IntegerGrid(name, num_levels, group_size, Span.SIGNED if suffix else Span.ASYMMETRIC)
        case ("compressed-tensors", 4, "" | "-asym"):
            span = Span.ASYMMETRIC if suffix else Span.SYMMETRIC
            return IntegerGrid(name, num_levels, group_size, span, native=True)
        case ("quanto", 8, "") if group_size is None:
            return IntegerGrid(name, num_levels - 1, None, Span.SYMMETRIC, native=True)
    return None
