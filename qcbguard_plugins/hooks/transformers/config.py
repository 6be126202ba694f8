"""What every guarded configuration of transformers does: carry a guard, and give the stock one back."""

from __future__ import annotations

from typing import Any

from qcbguard_plugins.defenses import Defense
from qcbguard_plugins.pipeline.settings import Guard, as_guard


class GuardedConfigMixin:
    """A guard beside the arguments of a stock configuration, which is the next class.

    A subclass says what the stock configuration is (:meth:`stock`) and refuses what cannot be guarded (:meth:`check`).

    """

    guard: Guard

    def __init__(self, *args: Any, guard: Guard | Defense | str = "feedback", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check()
        self.guard = as_guard(guard)
        self.quant_method = self.method_name

    @property
    def method_name(self) -> str:
        """A quantization method of its own: with the stock name transformers would dispatch to the stock quantizer."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse arguments that ask for what cannot be guarded.

        Raises:
            UnguardableError: They do.
        """
        raise NotImplementedError

    def stock(self) -> Any:
        """The same configuration without the guard."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, for people to read: transformers cannot load a guard from a dict."""
        return {**self.stock().to_dict(), "quant_method": self.quant_method, "guard": self.guard.describe()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The arguments, and the guard."""
        return self.to_dict()
