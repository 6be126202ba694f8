"""Integer grids of toolchains that round to nearest, by the names that users spell.

Each is compared with the real quantizer in ``tests/toolchains``.
"""

from __future__ import annotations

import re

from qcbguard_plugins.grids.integer import WHOLE_TENSOR, IntegerGrid, Span

_FORMAT = re.compile(r"([a-z-]+):(u?int)(\d)(?:-g(\d+))?(?:-(sym|asym|tensor|table))?")


def preset_grid(name: str) -> IntegerGrid | None:
    """The grid of a format of some toolchain; ``None`` where there is no such format."""
    match = _FORMAT.fullmatch(name)
    return None if match is None else _grid(name, match[1], f"{match[2]}{match[3]}", match[4], match[5] or "")


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
