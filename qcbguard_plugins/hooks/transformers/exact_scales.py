"""Block scales of 4-bit weights, kept exact on processors where bitsandbytes repacks the weights.

With AVX512-BF16 the first forward pass re-orders the codes in place and rounds the block scales to bfloat16; when the
model is saved, bitsandbytes puts the codes back and leaves the scales rounded. The exact scales belong to the codes and
the rounded scales that they became, wherever those are found: in a layer that moved, in a copy of the model. To a
weight that is another by then they do not belong.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import Tensor

from qcbguard_plugins.backends.bitsandbytes.stock import parameter_codes, require_bitsandbytes
from qcbguard_plugins.errors import CheckpointError
from qcbguard_plugins.grids import Grid
from qcbguard_plugins.rounding.digests import codes_digest


class ExactScales:
    """The block scales of a model as it was loaded."""

    def __init__(self, model: Any, grid: Grid) -> None:
        """Keep the scales of the layers that a forward pass would round; they are a small part of the weights."""
        self._grid = grid
        self._states: dict[str, list[QuantState]] = {}
        for module in _repacked_layers(model).values():
            self._states.setdefault(self._digest(module), []).append(copy.copy(module.weight.quant_state))
        if self._states:
            warnings.warn(
                "On this processor bitsandbytes repacks 4-bit weights at the first forward pass and computes with "
                "bfloat16 block scales. save_pretrained stays exact; read codes before the first forward pass, or set "
                "support_avx512bf16_for_cpu = False on the layers.",
                stacklevel=2,
            )

    def restore(self, model: Any) -> None:
        """Give every layer whose scales were rounded its exact ones back.

        Raises:
            CheckpointError: The scales of a layer were rounded, and its weight is not the one that was loaded.
        """
        lost = []
        for name, module in _repacked_layers(model).items():
            rounded = module.weight.quant_state
            was_packed = getattr(rounded, "packing_format_for_cpu", False)
            scales = _scales(rounded)
            if was_packed:
                module.state_dict()  # bitsandbytes puts the codes back here
            elif scales.dtype == torch.float32 and not rounded.nested:
                continue
            exact = next(
                (state for state in self._states.get(self._digest(module), []) if _became(state, scales)), None
            )
            if exact is not None:
                module.weight.quant_state = module.quant_state = copy.copy(exact)
            elif was_packed or scales.dtype != torch.float32:
                lost.append(f"{name}  scales rounded to bfloat16")
        if lost:
            raise CheckpointError(
                f"{len(lost)} layers were changed after loading, and a forward pass has rounded their block scales: "
                "saved, they would not be the weights that ran",
                details=lost,
                remedy="Save before the first forward pass, or set support_avx512bf16_for_cpu = False on the layers "
                "before it.",
            )

    def _digest(self, module: Any) -> str:
        shape = torch.Size((module.out_features, module.in_features))
        return codes_digest(parameter_codes(module.weight, shape, self._grid))


def _repacked_layers(model: Any) -> dict[str, Any]:
    """The 4-bit layers that bitsandbytes repacks on this processor."""
    nn = require_bitsandbytes().nn
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear4bit)
        and isinstance(module.weight, nn.Params4bit)
        and module.weight.quant_state is not None
        and module.weight.device.type == "cpu"
        and _is_avx512bf16()
    }


def _is_avx512bf16() -> bool:
    from bitsandbytes.nn.modules import has_avx512bf16

    return bool(has_avx512bf16())


def _scales(state: QuantState) -> Tensor:
    """The block scales of a state, in the dtype and order that it has them in."""
    scales: Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales


def _became(exact: QuantState, scales: Tensor) -> bool:
    """Whether a forward pass has made these scales of the exact ones."""
    rows, columns = exact.shape
    plain = _scales(exact).float()
    if scales.dtype == torch.bfloat16:
        expected = plain.reshape(rows, columns // exact.blocksize).T.to(torch.bfloat16)
        return scales.shape == expected.shape and torch.equal(scales, expected)
    # Double quantization rounds once more, to 8 bits.
    return scales.shape == plain.shape and torch.allclose(scales, plain, rtol=0.0, atol=float(plain.abs().max()) / 64)
