"""``qcbguard-scan-files FILE...``: what a commit hook calls, with the worst exit code of all files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# A finding outweighs an error, an error outweighs what could not be tested.
_WORST_FIRST = (1, 2, 4, 3, 0)


def scan_files(paths: Sequence[str]) -> int:
    """Scan files one by one and return the worst exit code.

    Each shard of a split model is scanned by itself, which needs no index.
    """
    from qcbguard_plugins.cli import main

    codes = set()
    for path in paths:
        print(path, flush=True)
        codes.add(main(["scan", "--", path]))
    return next(code for code in _WORST_FIRST if code in codes | {0})


def run() -> None:
    """Entry point of the script."""
    sys.exit(scan_files(sys.argv[1:]))
