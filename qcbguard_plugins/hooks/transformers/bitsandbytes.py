"""``GuardedBitsAndBytesConfig``: every argument of ``BitsAndBytesConfig``, and a guard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qcbguard_plugins.backends.base import Backend
from qcbguard_plugins.backends.bitsandbytes.backend import BitsAndBytes
from qcbguard_plugins.backends.bitsandbytes.stock import format_of, parameter_codes, require_bitsandbytes
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.hooks.transformers.config import GuardedConfigMixin
from qcbguard_plugins.hooks.transformers.exact_scales import ExactScales
from qcbguard_plugins.hooks.transformers.on_the_fly import GuardedHfQuantizerMixin
from qcbguard_plugins.hooks.transformers.other_loaders import refuse_other_loaders
from qcbguard_plugins.hooks.transformers.registration import register_quantizer
from qcbguard_plugins.pipeline.settings import Guard, as_guard

QUANT_METHOD_4BIT = "qcbguard_bitsandbytes_4bit"
QUANT_METHOD_8BIT = "qcbguard_bitsandbytes_8bit"


class GuardedBitsAndBytesConfig(GuardedConfigMixin, BitsAndBytesConfig):  # type: ignore[misc]
    """A bitsandbytes configuration whose weights are guarded before they are quantized.

    Pass it as ``quantization_config`` to ``from_pretrained``. The loaded model, and the checkpoint saved from it, are
    those of stock bitsandbytes.

    Args:
        guard: A method's name, a defense with its parameters, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.
            The default, ``feedback``, runs the full-precision model once to calibrate and keeps the result in a cache.
        kwargs: Arguments of ``BitsAndBytesConfig``.

    Raises:
        UsageError: The guard is unknown.
        UnguardableError: The arguments ask for no quantization that can be guarded.
    """

    def check(self) -> None:
        format_of(self)

    @property
    def method_name(self) -> str:
        return QUANT_METHOD_4BIT if self.load_in_4bit else QUANT_METHOD_8BIT

    def stock(self) -> BitsAndBytesConfig:
        arguments = BitsAndBytesConfig.to_dict(self)
        for own in ("guard", "quant_method", "_load_in_4bit", "_load_in_8bit"):
            arguments.pop(own)
        return BitsAndBytesConfig(**arguments)

    def to_diff_dict(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, and the guard."""
        return {**self.stock().to_diff_dict(), "guard": self.guard.describe()}


class _BitsAndBytesMixin(GuardedHfQuantizerMixin):
    """What is bitsandbytes' own."""

    backend: ClassVar[Backend] = BitsAndBytes()

    def __init__(self, config: GuardedBitsAndBytesConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._exact_scales: ExactScales | None = None

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
        if self.quantization_config.load_in_4bit:
            self._exact_scales = ExactScales(model, self.grid)
        return loaded

    def scales_of(self, parameter: Any) -> Any:
        state = getattr(parameter, "quant_state", None)
        return None if state is None else (state.absmax, state.offset if state.nested else None)

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, str]]:
        """What ``save_pretrained`` stores: exact block scales, and the guard in each file's header.

        Raises:
            CheckpointError: Block scales have been rounded, and the exact ones are those of another weight.
        """
        if self._exact_scales is not None:
            self._exact_scales.restore(model)
        return super().get_state_dict_and_metadata(model, *args, **kwargs)


class GuardedBnb4BitHfQuantizer(_BitsAndBytesMixin, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Stock 4-bit quantizer behind a guard."""


class GuardedBnb8BitHfQuantizer(_BitsAndBytesMixin, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """Stock 8-bit quantizer behind a guard."""


_QUANTIZERS: dict[str, Any] = {
    QUANT_METHOD_4BIT: GuardedBnb4BitHfQuantizer,
    QUANT_METHOD_8BIT: GuardedBnb8BitHfQuantizer,
}


def register() -> None:
    """Register the guarded configuration and quantizers; a second call changes nothing.

    Raises:
        MissingDependencyError: This transformers lacks a hook that the guard stands on.
    """
    for method, quantizer in _QUANTIZERS.items():
        register_quantizer(method, quantizer, GuardedBitsAndBytesConfig)


@contextmanager
def activate(guard: Guard | Defense | str = "feedback") -> Iterator[None]:
    """Guard every bitsandbytes load in a block of code that passes stock configurations or dicts.

    Loaders that quantize with bitsandbytes and without transformers, such as accelerate's ``load_and_quantize_model``
    and diffusers, are stopped in the block: nothing in it is loaded unguarded.

    Not thread-safe: while the block runs, all threads of the process load guarded.

    Args:
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.pipeline.settings.Guard`.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        UnguardableError: In the block, from a loader that cannot be guarded.
    """
    register()
    requested = as_guard(guard)
    mapping = auto.AUTO_QUANTIZER_MAPPING
    replaced = {"bitsandbytes_4bit": GuardedBnb4BitHfQuantizer, "bitsandbytes_8bit": GuardedBnb8BitHfQuantizer}
    before = {name: mapping[name] for name in replaced}
    for name, quantizer in replaced.items():
        mapping[name] = _with_guard(quantizer, requested)
    try:
        with refuse_other_loaders():
            yield
    finally:
        mapping.update(before)


def _with_guard(quantizer: Any, guard: Guard) -> Any:
    def make(config: Any, **kwargs: Any) -> Any:
        if not isinstance(config, GuardedBitsAndBytesConfig):
            arguments = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
            arguments.pop("quant_method")
            config = GuardedBitsAndBytesConfig(**arguments, guard=guard)
        return quantizer(config, **kwargs)

    return make


register()
