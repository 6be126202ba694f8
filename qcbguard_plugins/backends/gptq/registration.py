"""Make transformers know guarded GPTQ. Importing this module registers it."""

from __future__ import annotations

from qcbguard_plugins.backends.gptq.config import QUANT_METHOD, GuardedGPTQConfig
from qcbguard_plugins.backends.gptq.quantizer import GuardedGptqHfQuantizer
from qcbguard_plugins.backends.registration import register_quantizer

__all__ = ["GuardedGPTQConfig", "register"]


def register() -> None:
    """Register the guarded configuration and quantizer; a second call changes nothing."""
    register_quantizer(QUANT_METHOD, GuardedGptqHfQuantizer, GuardedGPTQConfig)


register()
