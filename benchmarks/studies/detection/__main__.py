"""``python -m benchmarks.studies.detection``: measure, and write ``docs/detection.md`` with its plots."""

from __future__ import annotations

from pathlib import Path

from benchmarks._common import DATA_DIR, DOCS_DIR, parser_of


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--results", type=Path, default=DATA_DIR / "detection.jsonl")
    parser.add_argument("--docs", type=Path, default=DOCS_DIR)
    parser.add_argument("--only-write", action="store_true", help="Use the results as they are.")
    arguments = parser.parse_args()
    if not arguments.only_write:
        from benchmarks.studies.detection.measure import run

        run(arguments.results)
    from benchmarks.studies.detection.document import write

    write(arguments.results, arguments.docs)


if __name__ == "__main__":
    main()
