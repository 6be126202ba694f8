"""Print what ``tests.hostile.fuzz.run --json`` wrote as a table; a later file wins.

python -m tests.hostile.fuzz.figures fuzz.json [LATER.json ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.hostile.fuzz.targets import TARGETS


def main() -> None:
    figures = {}
    for path in sys.argv[1:]:
        figures |= json.loads(Path(path).read_text())
    print("| target | what is read | minutes | processor s | inputs | edges | findings left |")
    print("|---|---|---|---|---|---|---|")
    for name, target in TARGETS.items():
        if name in figures:
            own = figures[name]
            row = (own["minutes"], round(own.get("cpu_s", 0)), own["executions"], own["edges"], len(own["findings"]))
            print(f"| `{name}` | {target.summary} | {' | '.join(f'{value:,}' for value in row)} |")


if __name__ == "__main__":
    main()
