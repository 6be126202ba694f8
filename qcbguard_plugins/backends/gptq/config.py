"""``GuardedGPTQConfig``: every argument of ``GPTQConfig``, and a guard."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GPTQConfig

from qcbguard_plugins.backends.gptq.stock import grid_of
from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.guard import Guard, as_guard

QUANT_METHOD = "qcbguard_gptq"


class GuardedGPTQConfig(GPTQConfig):  # type: ignore[misc]
    """A GPTQ configuration whose weights are guarded before they are quantized.

    Pass it as ``quantization_config`` to ``from_pretrained``. The loaded model, and the checkpoint saved from it, are
    those of stock GPTQ; ``meta`` says that it was guarded.

    Args:
        guard: A method's name, a defense with its parameters, or a :class:`~qcbguard_plugins.guard.Guard`.
        kwargs: Arguments of ``GPTQConfig``.

    Raises:
        UsageError: The guard is unknown, or the group size is none of 32, 64, 128 and -1.
        UnguardableError: The arguments leave open what the groups are.
    """

    def __init__(self, *args: Any, guard: Guard | Defense | str = "feedback", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        grid_of(self.bits, self.group_size, self.sym, self.desc_act)
        self.guard = as_guard(guard)
        # A method of its own: with the stock name transformers would dispatch to the stock quantizer, unguarded.
        self.quant_method = QUANT_METHOD

    def stock(self) -> GPTQConfig:
        """The same configuration without the guard."""
        names = [name for name in inspect.signature(GPTQConfig.__init__).parameters if name not in ("self", "kwargs")]
        return GPTQConfig(**{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, for people to read: transformers cannot load a guard from a dict."""
        return {**self.stock().to_dict(), "quant_method": self.quant_method, "guard": self.guard.describe()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The arguments, and the guard."""
        return self.to_dict()
