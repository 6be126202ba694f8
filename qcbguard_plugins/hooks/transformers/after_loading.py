"""What becomes of a guarded model after it was loaded: merged, dequantized, cut, or the base of an adapter."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from qcbguard_plugins.checkpoint.provenance import PROVENANCE_KEY


def forget_provenance(model: Any, why: str) -> None:
    """Take the guard's claim from a model whose weights are no longer those that it made."""
    if getattr(model.config, PROVENANCE_KEY, None) is not None:
        delattr(model.config, PROVENANCE_KEY)
        warnings.warn(
            f"The model is no longer described as guarded: {why}. Guard it again before it is quantized and shared.",
            stacklevel=3,
        )


def has_adapters(model: Any) -> bool:
    """Whether adapters of peft are in a model, not merged."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def warn_of_adapters(model: Any, prefix: str, keep_vars: bool) -> None:
    """Say, when an adapter is saved, which base it must go with; a hook of ``state_dict``."""
    if not has_adapters(model) or getattr(model, "_qcbguard_warned", False):
        return
    model._qcbguard_warned = True
    warnings.warn(
        f"The adapter names {model.name_or_path} as its base, and that is not guarded: merged into it and quantized, "
        "what the guard removed is back. Guard the base into a folder with 'qcbguard guard', train on that folder, and "
        "share the two together.",
        stacklevel=2,
    )
