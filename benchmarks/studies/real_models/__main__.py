"""``python -m benchmarks.studies.real_models``: fetch real models, attack them, and test clean and attacked ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks._common import DATA_DIR, DOCS_DIR
from benchmarks.studies.real_models.catalogue import MODELS

RESULTS = DATA_DIR / "real_models.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.real_models", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching = verbs.add_parser("fetch", help="fetch models by version and hash, and dequantize them")
    fetching.add_argument("names", nargs="*", default=["smollm2-135m"], help=f"of {', '.join(MODELS)}")
    attacking = verbs.add_parser("attack", help="make attacked models; resumable")
    attacking.add_argument("names", nargs="*", help="all by default")
    studying = verbs.add_parser("study", help="test every model that is at hand; resumable")
    studying.add_argument("--results", type=Path, default=RESULTS)
    studying.add_argument("--only", default="", help="only models whose name contains this")
    verbs.add_parser("document", help="write the part of docs/detection.md about real models")
    arguments = parser.parse_args()
    if arguments.verb == "fetch":
        from benchmarks.studies.real_models.fetch import fetch

        for name in arguments.names:
            print(fetch(name))
    elif arguments.verb == "document":
        from benchmarks.studies.real_models.document import write_first_part

        write_first_part(DOCS_DIR)
    elif arguments.verb == "study":
        from benchmarks.studies.real_models.study import run_study

        run_study(arguments.results, only=arguments.only)
    else:
        from benchmarks.studies.real_models.attack import run_attack
        from benchmarks.studies.real_models.population import ATTACK_SPECS

        for name in arguments.names or list(ATTACK_SPECS):
            print(run_attack(ATTACK_SPECS[name]))


if __name__ == "__main__":
    main()
