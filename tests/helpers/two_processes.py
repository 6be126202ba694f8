"""Run command lines one after the other, as every process of a launcher does; ends with the first exit code but 0.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.helpers.two_processes COMMANDS.json

A start of torch and its libraries for each process, and not for each command.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qcbguard_plugins.cli import main

if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        code = main(command)
        if code:
            sys.exit(code)
