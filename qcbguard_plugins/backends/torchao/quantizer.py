"""Guarded torchao for transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from qcbguard_plugins.backends.in_flight import GuardMixin
from qcbguard_plugins.backends.torchao.stock import format_of, is_quantized, parameter_codes


class GuardedTorchAoHfQuantizer(GuardMixin, TorchAoHfQuantizer):  # type: ignore[misc]
    """Stock torchao behind a guard."""

    toolchain: ClassVar[str] = "torchao"

    def format_of(self, config: Any) -> str:
        return format_of(config)

    def layers_to_quantize(self, model: Any) -> Iterable[tuple[str, Any]]:
        return [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and self.param_needs_quantization(model, f"{name}.weight")
        ]

    def stored_codes(self, parameter: Any, shape: torch.Size) -> Tensor:
        return parameter_codes(parameter, self.grid.num_levels)

    def is_quantized(self, parameter: Any) -> bool:
        return is_quantized(parameter)
