"""Published attacks, one a file, each named as its paper names it. Importing this package registers them all.

Input triggers are no attack of their own: any attack gets one from a scenario whose name ends in ``+trigger``.
"""

from __future__ import annotations

from qcbguard_plugins.lab.attacks.adaptive import Adaptive
from qcbguard_plugins.lab.attacks.base import Attack, AttackInputs, available_attacks, get_attack, register_attack
from qcbguard_plugins.lab.attacks.elq import Elq
from qcbguard_plugins.lab.attacks.gptq_box import GptqBox
from qcbguard_plugins.lab.attacks.mind_the_gap import MindTheGap
from qcbguard_plugins.lab.attacks.outlier_injection import OutlierInjection
from qcbguard_plugins.lab.attacks.straight_through import StraightThrough

__all__ = [
    "Adaptive",
    "Attack",
    "AttackInputs",
    "Elq",
    "GptqBox",
    "MindTheGap",
    "OutlierInjection",
    "StraightThrough",
    "available_attacks",
    "get_attack",
    "register_attack",
]
