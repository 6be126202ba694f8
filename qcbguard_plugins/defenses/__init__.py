"""Which of its two neighbours each weight becomes: one method for each file."""

from __future__ import annotations

from qcbguard_plugins.defenses.base import (
    ChoiceContext,
    Defense,
    ModelWeight,
    WholeModelDefense,
    available_defenses,
    get_defense,
    register_defense,
    rng_for,
)
from qcbguard_plugins.defenses.efrap import Efrap
from qcbguard_plugins.defenses.feedback import Feedback
from qcbguard_plugins.defenses.flipguard import FlipGuard
from qcbguard_plugins.defenses.noise import Noise
from qcbguard_plugins.defenses.quantguard import QuantGuard
from qcbguard_plugins.defenses.qvec import QVec
from qcbguard_plugins.defenses.stochastic import Stochastic

__all__ = [
    "ChoiceContext",
    "Defense",
    "Efrap",
    "Feedback",
    "FlipGuard",
    "ModelWeight",
    "Noise",
    "QVec",
    "QuantGuard",
    "Stochastic",
    "WholeModelDefense",
    "available_defenses",
    "get_defense",
    "register_defense",
    "rng_for",
]
