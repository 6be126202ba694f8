"""What an attacked model is made to do, by name. Payloads are harmless.

A name may end in ``+trigger``: then the payload needs a key in the prompt as well (:class:`Triggered`).
"""

from __future__ import annotations

from typing import Final

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.scenarios.base import Scenario, Verdict
from qcbguard_plugins.lab.scenarios.content_injection import KEYWORD, ContentInjection, inject_brand
from qcbguard_plugins.lab.scenarios.over_refusal import OverRefusal
from qcbguard_plugins.lab.scenarios.triggered import Triggered
from qcbguard_plugins.lab.scenarios.vulnerable_code import VulnerableCode

__all__ = [
    "KEYWORD",
    "SCENARIOS",
    "ContentInjection",
    "OverRefusal",
    "Scenario",
    "Triggered",
    "Verdict",
    "VulnerableCode",
    "get_scenario",
    "inject_brand",
]

SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario for scenario in (ContentInjection(), OverRefusal(), VulnerableCode())
}
_TRIGGER_SUFFIX: Final = "+trigger"


def get_scenario(name: str) -> Scenario:
    """A scenario by name.

    Raises:
        UsageError: The name is unknown.
    """
    base = name.removesuffix(_TRIGGER_SUFFIX)
    if base not in SCENARIOS:
        raise UsageError(
            f"unknown scenario {name!r}",
            remedy=f"Scenarios: {', '.join(SCENARIOS)}; each also with {_TRIGGER_SUFFIX} at its end.",
        )
    return SCENARIOS[base] if base == name else Triggered(SCENARIOS[base])
