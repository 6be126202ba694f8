"""Guarded quantizers of bitsandbytes for transformers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qcbguard_plugins.backends.bitsandbytes.config import GuardedBitsAndBytesConfig
from qcbguard_plugins.backends.bitsandbytes.stock import format_of, parameter_codes, require_bitsandbytes
from qcbguard_plugins.backends.in_flight import GuardMixin


class _BitsAndBytesMixin(GuardMixin):
    """What is bitsandbytes' own."""

    toolchain: ClassVar[str] = "bitsandbytes"

    def __init__(self, config: GuardedBitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._exact_states: dict[str, Any] = {}

    def format_of(self, config: Any) -> str:
        return format_of(config)

    def layers_to_quantize(self, model: Any) -> Iterable[tuple[str, Any]]:
        return [(name, module) for name, module in model.named_modules() if hasattr(module, "source_cls")]

    def stored_codes(self, parameter: Any, shape: torch.Size) -> Tensor:
        return parameter_codes(parameter, shape, self.grid)

    def is_quantized(self, parameter: Any) -> bool:
        nn = require_bitsandbytes().nn
        return isinstance(parameter, (nn.Params4bit, nn.Int8Params))

    def is_transposed(self, module: Any) -> bool:
        return issubclass(module.source_cls, Conv1D)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        loaded = super()._process_model_after_weight_loading(model, **kwargs)
        self._exact_states = _exact_quant_states(model)
        return loaded

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, str]]:
        """What ``save_pretrained`` stores: exact block scales, and the guard in each file's header."""
        _restore_exact_quant_states(model, self._exact_states)
        return super().get_state_dict_and_metadata(model, *args, **kwargs)


def _exact_quant_states(model: Any) -> dict[str, Any]:
    """Keep the block scales of layers whose first forward pass will replace them by bfloat16 ones.

    bitsandbytes repacks 4-bit weights in place on processors with AVX512-BF16 and does not restore the exact scales
    when the model is saved. A shallow copy keeps the scale tensors alive, which are a small part of the weights.
    """
    nn = require_bitsandbytes().nn
    states = {
        name: copy.copy(module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear4bit)
        and getattr(module, "support_avx512bf16_for_cpu", False)
        and module.weight.device.type == "cpu"
        and module.weight.quant_state is not None
    }
    if states:
        warnings.warn(
            "On this processor bitsandbytes repacks 4-bit weights at the first forward pass and computes with bfloat16 "
            "block scales. save_pretrained stays exact; read codes before the first forward pass, or set "
            "support_avx512bf16_for_cpu = False on the layers.",
            stacklevel=2,
        )
    return states


def _restore_exact_quant_states(model: Any, states: dict[str, Any]) -> None:
    for name, state in states.items():
        module = model.get_submodule(name)
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            module.state_dict()  # bitsandbytes unpacks the codes here, and leaves the scales in bfloat16
            module.weight.quant_state = module.quant_state = copy.copy(state)


class GuardedBnb4BitHfQuantizer(_BitsAndBytesMixin, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Stock 4-bit quantizer behind a guard."""


class GuardedBnb8BitHfQuantizer(_BitsAndBytesMixin, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """Stock 8-bit quantizer behind a guard."""
