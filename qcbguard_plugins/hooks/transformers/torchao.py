"""``GuardedTorchAoConfig``: every argument of ``TorchAoConfig``, and a guard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from qcbguard_plugins.backends.torchao.stock import format_of, is_quantized, parameter_codes
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.hooks.transformers.on_the_fly import GuardMixin
from qcbguard_plugins.hooks.transformers.registration import register_quantizer
from qcbguard_plugins.pipeline.settings import Guard, as_guard

QUANT_METHOD = "qcbguard_torchao"


class GuardedTorchAoConfig(TorchAoConfig):  # type: ignore[misc]
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

    def __init__(self, *args: Any, guard: Guard | Defense | str = "feedback", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        format_of(self)
        self.guard = as_guard(guard)
        # A method of its own: with the stock name transformers would dispatch to the stock quantizer, unguarded.
        self.quant_method = QUANT_METHOD

    def stock(self) -> TorchAoConfig:
        """The same configuration without the guard."""
        return TorchAoConfig(
            self.quant_type,
            self.modules_to_not_convert,
            self.include_input_output_embeddings,
            self.untie_embedding_weights,
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, for people to read: transformers cannot load a guard from a dict."""
        return {**self.stock().to_dict(), "quant_method": self.quant_method, "guard": self.guard.describe()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The arguments, and the guard."""
        return self.to_dict()


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


__all__ = ["GuardedTorchAoConfig", "register"]


def register() -> None:
    """Register the guarded configuration and quantizer; a second call changes nothing."""
    register_quantizer(QUANT_METHOD, GuardedTorchAoHfQuantizer, GuardedTorchAoConfig)


register()
