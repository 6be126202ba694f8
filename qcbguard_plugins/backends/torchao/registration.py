"""Make transformers know guarded torchao. Importing this module registers it."""

from __future__ import annotations

from qcbguard_plugins.backends.registration import register_quantizer
from qcbguard_plugins.backends.torchao.config import QUANT_METHOD, GuardedTorchAoConfig
from qcbguard_plugins.backends.torchao.quantizer import GuardedTorchAoHfQuantizer

__all__ = ["GuardedTorchAoConfig", "register"]


def register() -> None:
    """Register the guarded configuration and quantizer; a second call changes nothing."""
    register_quantizer(QUANT_METHOD, GuardedTorchAoHfQuantizer, GuardedTorchAoConfig)


register()
