"""Purification: take input-trigger backdoors out of a model that shows them in full precision.

Neither the trigger nor a clean reference is known. By default the model is fine-tuned on clean samples, some of which
carry a made-up key that is moved against the model before each step. As the paper has it, synthetic backdoors show
which units of the model a backdoor uses; these are suppressed, and a light fine-tuning heals what that broke.

References:
    Purifying Generative LLMs from Backdoors without Prior Knowledge or Clean Reference, arXiv 2603.13461 (ICLR 2026).
"""

from __future__ import annotations

from qcbguard_plugins.purification.architectures import Architecture
from qcbguard_plugins.purification.config import PurifyConfig
from qcbguard_plugins.purification.pipeline import plan_purification, purify, purify_planned

__all__ = ["Architecture", "PurifyConfig", "plan_purification", "purify", "purify_planned"]
