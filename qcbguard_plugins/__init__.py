"""Takes quantization-conditioned backdoors out of a model before the stock quantizer sees its weights.

Importing the package starts nothing heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcbguard_plugins.defenses import Efrap, Feedback, FlipGuard, Noise, QuantGuard, QVec, Stochastic
    from qcbguard_plugins.hooks.transformers.bitsandbytes import GuardedBitsAndBytesConfig, activate
    from qcbguard_plugins.hooks.transformers.gptq import GuardedGPTQConfig
    from qcbguard_plugins.hooks.transformers.torchao import GuardedTorchAoConfig
    from qcbguard_plugins.models.calibration import Calibration
    from qcbguard_plugins.pipeline.guard import guard_checkpoint
    from qcbguard_plugins.pipeline.model import guard_model
    from qcbguard_plugins.pipeline.settings import Guard
    from qcbguard_plugins.pipeline.verify import verify_checkpoint
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
    "Calibration": "models.calibration",
    "Efrap": "defenses",
    "Feedback": "defenses",
    "FlipGuard": "defenses",
    "Guard": "pipeline.settings",
    "GuardedBitsAndBytesConfig": "hooks.transformers.bitsandbytes",
    "GuardedGPTQConfig": "hooks.transformers.gptq",
    "GuardedTorchAoConfig": "hooks.transformers.torchao",
    "Noise": "defenses",
    "QVec": "defenses",
    "QuantGuard": "defenses",
    "Stochastic": "defenses",
    "activate": "hooks.transformers.bitsandbytes",
    "guard_checkpoint": "pipeline.guard",
    "guard_model": "pipeline.model",
    "purify": "purification",
    "verify_checkpoint": "pipeline.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = _MODULE_OF[name]
    if module.startswith("hooks.transformers."):
        import_module(f"{__name__}.models.skeleton").require_hooks()
        backend = module.rpartition(".")[2]
        require = {"bitsandbytes": "require_bitsandbytes", "gptq": "require_gptq", "torchao": "require_torchao"}[
            backend
        ]
        getattr(import_module(f"{__name__}.backends.{backend}.stock"), require)()
    return getattr(import_module(f"{__name__}.{module}"), name)
