"""Finds and removes backdoors that switch on only when a model is quantized.

Importing the package starts nothing heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcbguard_plugins.backends.ggml.backend import Ggml
    from qcbguard_plugins.backends.ggml.options import GgufOptions
    from qcbguard_plugins.cli.render.evidence.bom import to_bom
    from qcbguard_plugins.cli.render.evidence.card import to_card
    from qcbguard_plugins.cli.render.evidence.facts import collect_evidence
    from qcbguard_plugins.cli.render.evidence.statements import attest
    from qcbguard_plugins.defenses import Efrap, Feedback, FlipGuard, Noise, QuantGuard, QVec, Stochastic
    from qcbguard_plugins.detection.behaviour.compare import diff_model
    from qcbguard_plugins.detection.weights.scan import scan_model
    from qcbguard_plugins.hooks.gptqmodel import guard_gptq_model
    from qcbguard_plugins.hooks.llama_cpp import convert_guarded
    from qcbguard_plugins.hooks.llm_compressor import GuardConverter
    from qcbguard_plugins.hooks.transformers.bitsandbytes import GuardedBitsAndBytesConfig, activate
    from qcbguard_plugins.hooks.transformers.gptq import GuardedGPTQConfig
    from qcbguard_plugins.hooks.transformers.torchao import GuardedTorchAoConfig
    from qcbguard_plugins.models.calibration import Calibration
    from qcbguard_plugins.pipeline.gguf_guard import guard_gguf
    from qcbguard_plugins.pipeline.guard import guard_checkpoint
    from qcbguard_plugins.pipeline.model import guard_model
    from qcbguard_plugins.pipeline.settings import Guard
    from qcbguard_plugins.pipeline.verify import verify, verify_checkpoint
    from qcbguard_plugins.purification import purify

    __version__: str

__all__ = [
    "Calibration",
    "Efrap",
    "Feedback",
    "FlipGuard",
    "Ggml",
    "GgufOptions",
    "Guard",
    "GuardConverter",
    "GuardedBitsAndBytesConfig",
    "GuardedGPTQConfig",
    "GuardedTorchAoConfig",
    "Noise",
    "QVec",
    "QuantGuard",
    "Stochastic",
    "__version__",
    "activate",
    "attest",
    "collect_evidence",
    "convert_guarded",
    "diff_model",
    "guard_checkpoint",
    "guard_gguf",
    "guard_gptq_model",
    "guard_model",
    "purify",
    "scan_model",
    "to_bom",
    "to_card",
    "verify",
    "verify_checkpoint",
]

_MODULE_OF = {
    "Calibration": "models.calibration",
    "Efrap": "defenses",
    "Feedback": "defenses",
    "FlipGuard": "defenses",
    "Ggml": "backends.ggml.backend",
    "GgufOptions": "backends.ggml.options",
    "Guard": "pipeline.settings",
    "GuardConverter": "hooks.llm_compressor",
    "GuardedBitsAndBytesConfig": "hooks.transformers.bitsandbytes",
    "GuardedGPTQConfig": "hooks.transformers.gptq",
    "GuardedTorchAoConfig": "hooks.transformers.torchao",
    "Noise": "defenses",
    "QVec": "defenses",
    "QuantGuard": "defenses",
    "Stochastic": "defenses",
    "activate": "hooks.transformers.bitsandbytes",
    "attest": "cli.render.evidence.statements",
    "collect_evidence": "cli.render.evidence.facts",
    "convert_guarded": "hooks.llama_cpp",
    "diff_model": "detection.behaviour.compare",
    "guard_checkpoint": "pipeline.guard",
    "guard_gguf": "pipeline.gguf_guard",
    "guard_gptq_model": "hooks.gptqmodel",
    "guard_model": "pipeline.model",
    "purify": "purification",
    "scan_model": "detection.weights.scan",
    "to_bom": "cli.render.evidence.bom",
    "to_card": "cli.render.evidence.card",
    "verify": "pipeline.verify",
    "verify_checkpoint": "pipeline.verify",
}

# The backends behind front doors that transformers must know of.
_BACKEND_OF = {
    "hooks.transformers.bitsandbytes": "bitsandbytes",
    "hooks.transformers.gptq": "gptq",
    "hooks.transformers.torchao": "torchao",
    "hooks.llm_compressor": "compressed-tensors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("qcbguard-plugins")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    if module in _BACKEND_OF:
        import_module(f"{__name__}.backends.formats").BACKENDS[_BACKEND_OF[module]].require()
    if module.startswith("hooks.transformers."):
        import_module(f"{__name__}.models.skeleton").require_hooks()
    return getattr(import_module(f"{__name__}.{module}"), name)
