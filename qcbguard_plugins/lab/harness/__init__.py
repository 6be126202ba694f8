"""The lab's held-out tasks for lm-evaluation-harness: ``--include_path`` this folder, ``--tasks qcb_lab``."""

from pathlib import Path
from typing import Final

#: What ``--include_path`` and ``TaskManager(include_path=...)`` take.
TASKS_DIR: Final = Path(__file__).resolve().parent
