"""``GuardedBitsAndBytesConfig``: every argument of ``BitsAndBytesConfig``, and a guard."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig

from qcbguard_plugins.backends.bitsandbytes.stock import format_of
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.guard import Guard, as_guard

QUANT_METHOD_4BIT = "qcbguard_bitsandbytes_4bit"
QUANT_METHOD_8BIT = "qcbguard_bitsandbytes_8bit"


class GuardedBitsAndBytesConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """A bitsandbytes configuration whose weights are guarded before they are quantized.

    Pass it as ``quantization_config`` to ``from_pretrained``. The loaded model, and the checkpoint saved from it, are
    those of stock bitsandbytes.

    Args:
        guard: A method's name, a defense with its parameters, or a :class:`~qcbguard_plugins.guard.Guard`. The default,
            ``feedback``, runs the full-precision model once to calibrate and keeps the result in a cache.
        kwargs: Arguments of ``BitsAndBytesConfig``.

    Raises:
        UsageError: The guard is unknown.
        UnguardableError: The arguments ask for no quantization that can be guarded.
    """

    def __init__(self, *args: Any, guard: Guard | Defense | str = "feedback", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        format_of(self)
        self.guard = as_guard(guard)
        # A method of its own: with the stock name transformers would dispatch to the stock quantizer, unguarded.
        self.quant_method = QUANT_METHOD_4BIT if self.load_in_4bit else QUANT_METHOD_8BIT

    def stock(self) -> BitsAndBytesConfig:
        """The same configuration without the guard."""
        arguments = super().to_dict()
        for own in ("guard", "quant_method", "_load_in_4bit", "_load_in_8bit"):
            arguments.pop(own)
        return BitsAndBytesConfig(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, for people to read: transformers cannot load a guard from a dict."""
        return {**super().to_dict(), "guard": self.guard.describe()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, and the guard."""
        return {**self.stock().to_diff_dict(), "guard": self.guard.describe()}
