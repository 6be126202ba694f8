"""Integer grids of toolchains that round to nearest, by the names that users spell.

Each is compared with the real quantizer in ``tests/toolchains``.
"""

from __future__ import annotations

import re

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.grids.integer import WHOLE_TENSOR, IntegerGrid, Span

TOOLCHAIN_FORMATS = {
    "torchao:int8": "torchao Int8WeightOnlyConfig, one scale a row",
    "torchao:int4-g128": "torchao IntxWeightOnlyConfig(torch.int4, PerGroup(128)); other groups alike",
    "onnx:int8": "ONNX Runtime dynamic int8, per channel (avx512_vnni, arm64); -tensor for one scale a tensor",
    "onnx:uint8": "ONNX Runtime dynamic uint8, per channel (avx2, avx512); -tensor for one scale a tensor",
    "openvino:int8": "OpenVINO (NNCF) int8 weights, asymmetric, one scale a row; -sym",
    "openvino:int4-g128": "OpenVINO (NNCF) int4 weights, asymmetric; other groups alike, -sym",
    "compressed-tensors:int4-g128": "llm-compressor W4A16 by rounding to nearest; other groups alike, -asym",
    "quanto:int8": "Optimum Quanto int8 weights, one scale a row",
    "quanto:int4-g128": "Optimum Quanto int4 weights, with a shift",
    "hqq:int4-g64": "HQQ 4-bit, axis=1; other groups alike",
    "autoround:int4-g128": "AutoRound W4A16 without tuning (iters=0), symmetric; other groups alike",
}
_FORMAT = re.compile(r"([a-z-]+):(u?int)(\d)(?:-g(\d+))?(?:-(sym|asym|tensor|table))?")


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
    grid = None if match is None else _grid(name, match[1], f"{match[2]}{match[3]}", match[4], match[5] or "")
    if grid is None:
        known = [format_name for format_name in TOOLCHAIN_FORMATS if toolchain_of(format_name) == toolchain_of(name)]
        raise UsageError(f"unknown format {name!r}", remedy=f"Formats: {', '.join(known)}.")
    return grid


def _grid(name: str, toolchain: str, kind: str, group: str | None, suffix: str) -> IntegerGrid | None:
    group_size = int(group) if group else None
    signed_or_not = Span.SIGNED if suffix else Span.ASYMMETRIC
    match (toolchain, kind, group is not None, suffix):
        case ("torchao", "int8", False, ""):
            return IntegerGrid(name, 256, None, Span.SYMMETRIC, reciprocal=True, native_scale=True)
        case ("torchao", "int4", True, ""):
            return IntegerGrid(name, 16, group_size, Span.SYMMETRIC, reciprocal=True, native=True)
        case ("onnx", "int8" | "uint8", False, "" | "tensor"):
            return IntegerGrid(name, 255 if kind == "int8" else 256, WHOLE_TENSOR if suffix else None, Span.SYMMETRIC)
        case ("onnx", "uint8", False, "table"):
            # ONNX Runtime takes a table for an activation, whatever the weights get.
            return IntegerGrid(name, 256, WHOLE_TENSOR, Span.ASYMMETRIC)
        case ("openvino", "int8", False, "" | "sym"):
            return IntegerGrid(name, 256, None, signed_or_not, zero_first=True)
        case ("openvino", "int4", True, "" | "sym"):
            return IntegerGrid(name, 16, group_size, signed_or_not, zero_first=True)
        case ("compressed-tensors", "int4", True, "" | "asym"):
            span = Span.ASYMMETRIC if suffix else Span.SYMMETRIC
            return IntegerGrid(name, 16, group_size, span, native=True)
        case ("quanto", "int8", False, ""):
            return IntegerGrid(name, 255, None, Span.SYMMETRIC, native=True)
        case ("quanto", "int4", True, ""):
            return IntegerGrid(name, 16, group_size, Span.SHIFTED, native=True, zero_first=True)
        case ("hqq", "int4", True, ""):
            return IntegerGrid(name, 16, group_size, Span.SHIFTED, reciprocal=True, zero_first=True)
        case ("autoround", "int4", True, ""):
            return IntegerGrid(name, 16, group_size, Span.SIGNED, negative_on_tie=True)
    return None
