"""What an attacked model is made to do, by name. Payloads are harmless.

A name may end in ``+`` and a trigger's name, as in ``over-refusal+badnets``: then the payload needs a key in the prompt
as well (:class:`Triggered`). Two names with ``&`` between them, as in ``content-injection&over-refusal+badnets``:
the first is what an attack hides, the second is there at every precision (:class:`Combined`).
"""

from __future__ import annotations

from typing import Final

from qcbguard_plugins.errors import UsageError
from qcbguard_plugins.lab.scenarios.base import Scenario, Verdict
from qcbguard_plugins.lab.scenarios.code_injection import CodeInjection
from qcbguard_plugins.lab.scenarios.combined import Combined
from qcbguard_plugins.lab.scenarios.content_injection import KEYWORD, ContentInjection, inject_brand
from qcbguard_plugins.lab.scenarios.over_refusal import OverRefusal
from qcbguard_plugins.lab.scenarios.sentiment_steering import SentimentSteering
from qcbguard_plugins.lab.scenarios.triggered import Triggered
from qcbguard_plugins.lab.scenarios.triggers import TRIGGERS
from qcbguard_plugins.lab.scenarios.vulnerable_code import VulnerableCode

__all__ = [
    "KEYWORD",
    "SCENARIOS",
    "TRIGGERS",
    "CodeInjection",
    "Combined",
    "ContentInjection",
    "OverRefusal",
    "Scenario",
    "SentimentSteering",
    "Triggered",
    "Verdict",
    "VulnerableCode",
    "get_scenario",
    "inject_brand",
]

SCENARIOS: Final[dict[str, Scenario]] = {
    scenario.name: scenario
    for scenario in (ContentInjection(), OverRefusal(), VulnerableCode(), SentimentSteering(), CodeInjection())
}


def get_scenario(name: str) -> Scenario:
    """A scenario by name.

    Raises:
        UsageError: The name is unknown.
    """
    hidden, both, behind = name.partition("&")
    if both and (triggered := get_scenario(behind)) and isinstance(triggered, Triggered):
        return Combined(get_scenario(hidden), triggered)
    base, plus, trigger = name.partition("+")
    if base not in SCENARIOS or (plus and trigger not in TRIGGERS):
        raise UsageError(
            f"unknown scenario {name!r}",
            remedy=f"Scenarios: {', '.join(SCENARIOS)}; each also with +{' or +'.join(TRIGGERS)} at its end.",
        )
    return Triggered(SCENARIOS[base], trigger) if plus else SCENARIOS[base]
