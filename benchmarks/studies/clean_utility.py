"""What a guard costs a clean model, text by text: its divergence over that of plain rounding.

    python -m benchmarks.studies.clean_utility [--texts 400] [--seeds 3] FOLDER=PAIRS
    python -m benchmarks.studies.clean_utility lab --cache CACHE

Both roundings answer for the same texts, so the interval of their ratio is over texts drawn in pairs: far narrower than
those of the two divergences, and the one that says whether a guard is nearer to full precision than no guard.
"""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks._common import parser_of
from qcbguard_plugins.cli.lab import cache_dir
from qcbguard_plugins.cli.output import quieten_libraries
from qcbguard_plugins.lab.bench.defense_specs import parse_defense
from qcbguard_plugins.lab.bench.rows import held_out_pairs, read_question_file
from qcbguard_plugins.lab.bench.tables import number, short
from qcbguard_plugins.lab.corpus import Pair
from qcbguard_plugins.lab.evaluation import padding_tokenizer
from qcbguard_plugins.lab.intervals import ratio_of_sums
from qcbguard_plugins.lab.loading import FULL_PRECISION, load_as
from qcbguard_plugins.lab.recipes import train_model
from qcbguard_plugins.lab.specs import ModelSpec
from qcbguard_plugins.lab.token_probabilities import Reading, divergences, read_answers
from qcbguard_plugins.pipeline.guard import guard_checkpoint
from qcbguard_plugins.pipeline.settings import Guard


def read(folder: Path, format: str, pairs: list[Pair]) -> list[Reading]:
    """What a folder, loaded in one format, expects at the answers."""
    return read_answers(load_as(folder, format), padding_tokenizer(folder), pairs)


def read_guarded(folder: Path, format: str, pairs: list[Pair], defense: str, seed: int) -> list[Reading]:
    """The same behind a guard."""
    with tempfile.TemporaryDirectory(prefix="qcbguard-lab-") as temporary:
        guarded_dir = Path(temporary) / "guarded"
        guard_checkpoint(folder, guarded_dir, [format], Guard(parse_defense(defense), seed=seed))
        return read(guarded_dir, format, pairs)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "model", metavar="FOLDER=PAIRS", help="a clean model and JSON lines of held-out pairs, or 'lab'"
    )
    parser.add_argument("--cache", type=Path, help="where the lab keeps its clean model")
    parser.add_argument("--as", dest="formats", nargs="+", default=["nf4", "fp4", "int8"])
    parser.add_argument("--defenses", nargs="+", default=["feedback", "stochastic"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=400)
    args = parser.parse_args()
    quieten_libraries()
    name, _, pairs_path = args.model.partition("=")
    is_lab = args.model == "lab"
    folder = train_model(ModelSpec(), cache_dir(args.cache)) if is_lab else Path(name)
    pairs = (held_out_pairs(ModelSpec()) if is_lab else read_question_file(Path(pairs_path)))[: args.texts]
    reference = read(folder, FULL_PRECISION, pairs)
    table = Table("format", "defense", "KL of plain rounding", "KL, mean over seeds", "ratio (95 %)", box=None)
    for format_name in args.formats:
        plain = divergences(reference, read(folder, format_name, pairs))
        tokens = [len(reading.answer_ids) for reading in reference]
        for defense in args.defenses:
            runs = [
                divergences(reference, read_guarded(folder, format_name, pairs, defense, seed))
                for seed in range(args.seeds)
            ]
            guarded = [sum(of_text) / args.seeds for of_text in zip(*runs, strict=True)]
            kls = [short(ratio_of_sums(sums, tokens).value) for sums in (plain, guarded)]
            table.add_row(format_name, defense, *kls, number(ratio_of_sums(guarded, plain)))
    Console(width=110).print(f"{name}, {len(pairs)} texts, {args.seeds} seeds", table)


if __name__ == "__main__":
    main()
