"""Make transformers know a guarded quantizer, and keep it from overlooking a guard."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from qcbguard_plugins.errors import MissingDependencyError, UsageError

_HOOKS = ("get_quantize_ops", "get_weight_conversions", "preprocess_model", "get_state_dict_and_metadata")
_METHOD_PREFIX = "qcbguard_"


def register_quantizer(method: str, quantizer: Any, config: Any) -> None:
    """Register a guarded quantizer under a method name of its own; a second call changes nothing.

    Args:
        method: A name that starts with ``qcbguard_``.
        quantizer: The quantizer class.
        config: Its configuration class.

    Raises:
        MissingDependencyError: This transformers lacks a hook that the guard stands on.
    """
    missing = [hook for hook in _HOOKS if not callable(getattr(HfQuantizer, hook, None))]
    if missing:
        raise MissingDependencyError(
            "this version of transformers cannot be guarded in flight: HfQuantizer lacks " + ", ".join(missing),
            remedy="Install a tested version, or guard the checkpoint into a folder with 'qcbguard guard'.",
        )
    auto.AUTO_QUANTIZER_MAPPING[method] = quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
    if not isinstance(auto.AutoQuantizationConfig.__dict__["from_dict"], _RefuseGuardInDict):
        auto.AutoQuantizationConfig.from_dict = _RefuseGuardInDict(auto.AutoQuantizationConfig.__dict__["from_dict"])


class _RefuseGuardInDict(classmethod):  # type: ignore[type-arg]
    """``AutoQuantizationConfig.from_dict`` that does not overlook a guard.

    transformers reads ``load_in_4bit`` in a dict before anything else and loads unguarded, whatever else the dict says.
    """

    def __init__(self, stock: Any) -> None:
        def from_dict(cls: Any, quantization_config_dict: dict[str, Any]) -> Any:
            method = str(quantization_config_dict.get("quant_method", ""))
            if "guard" in quantization_config_dict or method.startswith(_METHOD_PREFIX):
                raise UsageError(
                    "a quantization_config given as a dict would be loaded without its guard",
                    remedy="Pass the Guarded...Config object itself, or load under qcbguard_plugins.activate(...).",
                )
            return stock.__func__(cls, quantization_config_dict)

        super().__init__(from_dict)
