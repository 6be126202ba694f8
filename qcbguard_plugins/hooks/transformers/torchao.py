"""``GuardedTorchAoConfig``: every argument of ``TorchAoConfig``, and a guard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.backends.torchao.backend import TorchAo
from qcbguard_plugins.backends.torchao.stock import format_of, is_quantized, parameter_codes
from qcbguard_plugins.hooks.transformers.config import GuardedConfigMixin
from qcbguard_plugins.hooks.transformers.on_the_fly import GuardedHfQuantizerMixin
from qcbguard_plugins.hooks.transformers.registration import register_quantizer

QUANT_METHOD = "qcbguard_torchao"


class GuardedTorchAoConfig(GuardedConfigMixin, TorchAoConfig):  # type: ignore[misc]
    """A torchao configuration whose weights are guarded before they are quantized.

    Pass it as ``quantization_config`` to ``from_pretrained``. The loaded model, and the checkpoint saved from it, are
    those of stock torchao. Int8 and int4 weight-only quantization can be guarded.

    Args:
        guard: A method's name, a defense with its parameters, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
        kwargs: Arguments of ``TorchAoConfig``.

    Raises:
        UsageError: The guard is unknown.
        UnguardableError: The arguments ask for a quantization that cannot be guarded.
    """

    @property
    def method_name(self) -> str:
        return QUANT_METHOD

    def check(self) -> None:
        format_of(self)

    def stock(self) -> TorchAoConfig:
        return TorchAoConfig(
            self.quant_type,
            self.modules_to_not_convert,
            self.include_input_output_embeddings,
            self.untie_embedding_weights,
        )


class GuardedTorchAoHfQuantizer(GuardedHfQuantizerMixin, TorchAoHfQuantizer):  # type: ignore[misc]
    """Stock torchao behind a guard."""

    backend: ClassVar[Backend] = TorchAo()

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


def register() -> None:
    """Register the guarded configuration and quantizer; a second call changes nothing."""
    register_quantizer(QUANT_METHOD, GuardedTorchAoHfQuantizer, GuardedTorchAoConfig)


register()
