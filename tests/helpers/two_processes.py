"""Run command lines one after the other, as every process of a launcher does; ends at an unexpected exit code.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.helpers.two_processes COMMANDS.json

The first process answers for all: what a command could not cover, only its exit code says.

A start of torch and its libraries for each process, and not for each command.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from qcbguard_plugins.cli import main

if __name__ == "__main__":
    for command, expected in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        code = main(command)
        if code != (expected if os.environ["RANK"] == "0" else 0):
            sys.exit(f"exit code {code}, expected {expected}: {command}")
