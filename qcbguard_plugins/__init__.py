"""Takes quantization-conditioned backdoors out of a model before the stock quantizer sees its weights.

Importing the package starts nothing heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcbguard_plugins.backends.bitsandbytes.config import GuardedBitsAndBytesConfig
    from qcbguard_plugins.backends.bitsandbytes.registration import activate
    from qcbguard_plugins.backends.gptq.config import GuardedGPTQConfig
    from qcbguard_plugins.backends.torchao.config import GuardedTorchAoConfig
    from qcbguard_plugins.calibration import Calibration
    from qcbguard_plugins.defenses import Efrap, Feedback, FlipGuard, Noise, QuantGuard, QVec, Stochastic
    from qcbguard_plugins.guard import Guard
    from qcbguard_plugins.model import guard_model
    from qcbguard_plugins.pipeline import guard_checkpoint, verify_checkpoint
    from qcbguard_plugins.purification import purify

__all__ = [
    "Calibration",
    "Efrap",
    "Feedback",
    "FlipGuard",
    "Guard",
    "GuardedBitsAndBytesConfig",
    "GuardedGPTQConfig",
    "GuardedTorchAoConfig",
    "Noise",
    "QVec",
    "QuantGuard",
    "Stochastic",
    "activate",
    "guard_checkpoint",
    "guard_model",
    "purify",
    "verify_checkpoint",
]

_MODULE_OF = {
    "Calibration": "calibration",
    "Efrap": "defenses",
    "Feedback": "defenses",
    "FlipGuard": "defenses",
    "Guard": "guard",
    "GuardedBitsAndBytesConfig": "backends.bitsandbytes.registration",
    "GuardedGPTQConfig": "backends.gptq.registration",
    "GuardedTorchAoConfig": "backends.torchao.registration",
    "Noise": "defenses",
    "QVec": "defenses",
    "QuantGuard": "defenses",
    "Stochastic": "defenses",
    "activate": "backends.bitsandbytes.registration",
    "guard_checkpoint": "pipeline",
    "guard_model": "model",
    "purify": "purification",
    "verify_checkpoint": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = _MODULE_OF[name]
    if module.startswith("backends."):
        import_module(f"{__name__}.backends.transformers").require_hooks()
    if module.startswith("backends.bitsandbytes"):
        import_module(f"{__name__}.backends.bitsandbytes.stock").require_bitsandbytes()
    elif module.startswith("backends.gptq"):
        import_module(f"{__name__}.backends.gptq.stock").require_gptq()
    elif module.startswith("backends.torchao"):
        import_module(f"{__name__}.backends.torchao.stock").require_torchao()
    return getattr(import_module(f"{__name__}.{module}"), name)
