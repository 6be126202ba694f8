"""``python -m qcbguard_plugins.cli``."""

from __future__ import annotations

from qcbguard_plugins.cli import run

run()
