"""``python -m benchmarks.detection``: measure, and write ``docs/detection.md`` with its plots."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "detection" / "results.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--only-write", action="store_true", help="Use the results as they are.")
    arguments = parser.parse_args()
    if not arguments.only_write:
        from benchmarks.detection.measure import run

        run(arguments.results)
    from benchmarks.detection.document import write

    write(arguments.results, arguments.docs)


if __name__ == "__main__":
    main()
