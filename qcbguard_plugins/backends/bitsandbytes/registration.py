"""Make transformers know the guarded quantizers. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers import auto

from qcbguard_plugins.backends.bitsandbytes.config import (
    QUANT_METHOD_4BIT,
    QUANT_METHOD_8BIT,
    GuardedBitsAndBytesConfig,
)
from qcbguard_plugins.backends.bitsandbytes.quantizer import GuardedBnb4BitHfQuantizer, GuardedBnb8BitHfQuantizer
from qcbguard_plugins.backends.registration import register_quantizer
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.guard import Guard, as_guard

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
