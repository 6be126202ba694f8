"""Make transformers know the guarded quantizers. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from qcbguard_plugins.backends.bitsandbytes.config import (
    QUANT_METHOD_4BIT,
    QUANT_METHOD_8BIT,
    GuardedBitsAndBytesConfig,
)
from qcbguard_plugins.backends.bitsandbytes.quantizer import GuardedBnb4BitHfQuantizer, GuardedBnb8BitHfQuantizer
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.errors import MissingDependencyError, UsageError
from qcbguard_plugins.guard import Guard, as_guard

_QUANTIZERS: dict[str, Any] = {
    QUANT_METHOD_4BIT: GuardedBnb4BitHfQuantizer,
    QUANT_METHOD_8BIT: GuardedBnb8BitHfQuantizer,
}
_HOOKS = ("get_quantize_ops", "get_weight_conversions", "preprocess_model", "get_state_dict_and_metadata")


def register() -> None:
    """Register the guarded configuration and quantizers; a second call changes nothing.

    Raises:
        MissingDependencyError: This transformers lacks a hook that the guard stands on.
    """
    missing = [hook for hook in _HOOKS if not callable(getattr(HfQuantizer, hook, None))]
    if missing:
        raise MissingDependencyError(
            "this version of transformers cannot be guarded in flight: HfQuantizer lacks " + ", ".join(missing),
            remedy="Install a tested version, or guard the checkpoint into a folder with 'qcbguard guard'.",
        )
    for method, quantizer in _QUANTIZERS.items():
        auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = GuardedBitsAndBytesConfig
    if not isinstance(auto.AutoQuantizationConfig.__dict__["from_dict"], _RefuseGuardInDict):
        auto.AutoQuantizationConfig.from_dict = _RefuseGuardInDict(auto.AutoQuantizationConfig.__dict__["from_dict"])


class _RefuseGuardInDict(classmethod):  # type: ignore[type-arg]
    """``AutoQuantizationConfig.from_dict`` that does not overlook a guard.

    transformers reads ``load_in_4bit`` in a dict before anything else and loads unguarded, whatever else the dict says.
    """

    def __init__(self, stock: Any) -> None:
        def from_dict(cls: Any, quantization_config_dict: dict[str, Any]) -> Any:
            method = str(quantization_config_dict.get("quant_method", ""))
            if "guard" in quantization_config_dict or method in _QUANTIZERS:
                raise UsageError(
                    "a quantization_config given as a dict would be loaded without its guard",
                    remedy="Pass a GuardedBitsAndBytesConfig object, or load under qcbguard_plugins.activate(...).",
                )
            return stock.__func__(cls, quantization_config_dict)

        super().__init__(from_dict)


@contextmanager
def activate(guard: Guard | Defense | str = "feedback") -> Iterator[None]:
    """Guard every bitsandbytes load in a block of code that passes stock configurations or dicts.

    Not thread-safe: while the block runs, all threads of the process load guarded.

    Args:
        guard: A method's name, a defense, or a :class:`~qcbguard_plugins.guard.Guard`.
    """
    register()
    requested = as_guard(guard)
    mapping = auto.AUTO_QUANTIZER_MAPPING
    replaced = {"bitsandbytes_4bit": GuardedBnb4BitHfQuantizer, "bitsandbytes_8bit": GuardedBnb8BitHfQuantizer}
    before = {name: mapping[name] for name in replaced}
    for name, quantizer in replaced.items():
        mapping[name] = _with_guard(quantizer, requested)
    try:
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
