"""Loaders that make bitsandbytes layers themselves: stopped where a block promises that every load is guarded.

accelerate's ``load_and_quantize_model`` and diffusers build ``Linear4bit`` and ``Linear8bitLt`` without the quantizers
of transformers, so no guard stands in front of them. What all such loaders have in common is the layers' constructors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qcbguard_plugins.backends.bitsandbytes.stock import require_bitsandbytes
from qcbguard_plugins.errors import UnguardableError

_GUARDED_CALLER = "transformers."


@contextmanager
def refuse_other_loaders() -> Iterator[None]:
    """Refuse bitsandbytes layers that anybody but transformers makes in a block.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        UnguardableError: In the block, from the constructor of a layer.
    """
    nn = require_bitsandbytes().nn
    kinds = (nn.Linear4bit, nn.Linear8bitLt)
    before = [kind.__init__ for kind in kinds]
    for kind in kinds:
        kind.__init__ = _for_transformers_only(kind.__name__, kind.__init__)
    try:
        yield
    finally:
        for kind, constructor in zip(kinds, before, strict=True):
            kind.__init__ = constructor


def _for_transformers_only(kind: str, constructor: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(constructor)
    def checked(self: Any, *arguments: Any, **keywords: Any) -> None:
        # Two blocks, one in the other, wrap each other.
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == __name__ and frame.f_back is not None:
            frame = frame.f_back
        caller = str(frame.f_globals.get("__name__", ""))
        if not caller.startswith(_GUARDED_CALLER):
            raise UnguardableError(
                f"{caller} makes a {kind} itself, and activate() guards what transformers loads",
                remedy="Guard the model's folder with 'qcbguard guard' and load that outside of the block. What is not "
                "a folder of transformers, such as a diffusion model, cannot be guarded for bitsandbytes.",
            )
        constructor(self, *arguments, **keywords)

    return checked
