"""Write docs/benchmark.md, its tables and its plots, from the results of ``qcbguard lab bench``.

    qcbguard lab bench full --out full-results
    qcbguard lab bench adaptive --out adaptive-results
    qcbguard lab bench draws --out draws-results
    qcbguard lab bench strength --out strength-results
    qcbguard lab bench ablation --out ablation-results
    python -m benchmarks.pages.benchmark_page

A part whose folder is absent is left out. What the numbers mean is written by hand in benchmark_reading.md.
"""

from pathlib import Path

import jinja2

from benchmarks._common import DOCS_DIR, parser_of
from qcbguard_plugins.lab.bench.output import (
    RESULTS_FILE,
    commits_of,
    describe_machine,
    draw_all,
    groups_of,
    places_of,
    read_report,
)
from qcbguard_plugins.lab.bench.plots import Plot
from qcbguard_plugins.lab.bench.profile import BenchProfile
from qcbguard_plugins.lab.bench.results import STOCK, BenchReport, Variant
from qcbguard_plugins.lab.bench.summary import Line, find, full_precision, stock, summarize
from qcbguard_plugins.lab.bench.tables import (
    asr_rows,
    attacker_rows,
    clean_rows,
    detail_table,
    markdown,
    method_rows,
    percent,
    utility_rows,
)

HERE = Path(__file__).resolve().parent
#: A method that was measured on fewer models does not decide which ones all have in common.
FEWEST_MODELS = 5
PARTS = {
    "adaptive": (
        "Attackers who know the defense",
        "Each attack was made against the defense in its name: `narrowed`, a box without the values that the defense "
        "would carry over a boundary; `adaptive`, training on sampled copies of the defense, the payload weighted as "
        "the good answers are; `strong` twice as much, `nudged` with slopes measured as they are against the others.",
    ),
    "draws": (
        "Draw by draw",
        "The two models on which the draw of `stochastic` in the main table (the first one here) lands more than two "
        "points from full precision, behind five draws; and the mean with Student's interval over draws.",
    ),
    "strength": ("Strength", "Each method along its own parameter. Dotted: no defense."),
    "ablation": (
        "QuantGuard's ablation",
        "Each loss term removed (its weight set to 0), and a grid over the weights of the two penalties.",
    ),
}


def load(folder: Path) -> tuple[BenchReport, BenchProfile]:
    """A result with its profile."""
    report = read_report(folder / RESULTS_FILE)
    if report is None:
        raise SystemExit(f"{folder} holds no results: run qcbguard lab bench first")
    return report, BenchProfile.model_validate(report.profile)


def draw(report: BenchReport, profile: BenchProfile, docs_dir: Path) -> list[Plot]:
    """Draw the plots of a result into the folder of its name."""
    folder = docs_dir / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_all(report, profile, folder, prefix=f"{profile.name}-")
    return [Plot(f"benchmark/{figure.file}", figure.title) for figure in figures]


def facts(report: BenchReport, profile: BenchProfile) -> dict[str, object]:
    """What the head of the page says."""
    return {
        "num_cells": len(report.cells),
        "num_failed": report.num_failed,
        "machine": describe_machine(report.machine),
        "commits": ", ".join(commits_of(report)),
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "notices": report.notices,
        "num_questions": profile.num_questions,
        "num_pairs": profile.num_pairs,
    }


def common_places(lines: list[Line], places: list[tuple[str, str]], defenses: list[str]) -> list[tuple[str, str]]:
    """Rows and formats on which every method was measured that was measured on more than a few."""
    where = {
        name: {place for place in places if find(lines, place[0], "attacked", place[1], name) is not None}
        for name in defenses
    }
    broad = [found for found in where.values() if len(found) >= FEWEST_MODELS]
    return [place for place in places if all(place in found for found in broad)]


def part(name: str, folder: Path, docs_dir: Path) -> dict[str, object]:
    """A section about a smaller benchmark: its methods and its plots."""
    report, profile = load(folder)
    lines = summarize(report.cells)
    places = places_of(lines, profile)
    head, rows = method_rows(lines, groups_of(places, profile), [entry.name for entry in profile.defenses])
    title, text = PARTS[name]
    models = ", ".join(f"{row} ({format_name})" for row, format_name in places)
    tables = [markdown(head, rows)]
    if name == "adaptive":
        tables = [
            markdown(*asr_rows(lines, places, [entry.name for entry in profile.defenses])),
            *tables,
            "What each attack costs its attacker, before any rounding:",
            markdown(*attacker_rows(lines, places)),
            *checks_text(report),
        ]
    if name == "draws":
        tables.insert(0, markdown(*draw_rows(report, lines, places, [entry.name for entry in profile.defenses])))
        tables += checks_text(report)
    return {
        "title": title,
        "text": f"{text} Models: {models}. Measured at {', '.join(commits_of(report))}.",
        "notices": report.notices,
        "table": "\n\n".join(tables),
        "figures": [] if name == "draws" else draw(report, profile, docs_dir),
    }


def draw_rows(
    report: BenchReport, lines: list[Line], places: list[tuple[str, str]], defenses: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Attack success rates of each draw beside their mean and full precision: a line a model and defense."""
    head = ["model", "format", "full precision", "defense", "draws, ASR %", "mean (95 % over draws)"]
    table = []
    for row, fmt in places:
        full = full_precision(lines, row)
        for name in defenses:
            line = find(lines, row, "attacked", fmt, name)
            found = [
                cell.measurement
                for cell in report.cells
                if (cell.place.row, cell.place.variant, cell.place.format, cell.place.defense)
                == (row, "attacked", fmt, name)
            ]
            if line is not None and full is not None:
                rates = ", ".join(f"{100 * one.asr.value:.0f}" for one in found if one is not None)
                over = percent(line.asr_over_seeds)
                table.append([row, fmt, f"{100 * full.asr.value:.0f}", name, rates, over])
    return head, table


def checks_text(report: BenchReport) -> list[str]:
    """How many checks hold, and a table of those that do not."""
    missed = [
        [c.row, c.format, "-" if c.defense == STOCK else c.defense, c.what, c.found]
        for c in report.checks
        if not c.held
    ]
    text = f"{len(report.checks) - len(missed)} of {len(report.checks)} checks hold."
    return [text, markdown(["model", "format", "defense", "expected", "found"], missed)] if missed else [text]


def utility_text(lines: list[Line], places: list[tuple[str, str]], defense: str) -> str:
    """How often a defense's interval of the divergence lies below that of plain rounding, above it, or across."""
    counts: dict[Variant, list[int]] = {"attacked": [0, 0, 0], "clean": [0, 0, 0]}
    for row, fmt in places:
        for variant, count in counts.items():
            ours, theirs = find(lines, row, variant, fmt, defense), stock(lines, row, fmt, variant)
            if ours is not None and theirs is not None and ours.kl is not None and theirs.kl is not None:
                (low, high), (other_low, other_high) = ((kl.low or 0.0, kl.high or 0.0) for kl in (ours.kl, theirs.kl))
                count[0 if high < other_low else 2 if low > other_high else 1] += 1
    told = (
        f"below on {below} of {below + across + above} {variant} models, across it on {across}, above on {above}"
        for variant, (below, across, above) in counts.items()
        if below + across + above
    )
    return f"* `{defense}`, interval of its KL against plain rounding's: {'; '.join(told)}."


def write_models(report: BenchReport, profile: BenchProfile, docs_dir: Path) -> None:
    """Every number of every model, on a page of its own."""
    lines = summarize(report.cells)
    text = ["# Benchmark: every model\n", "All numbers behind [benchmark.md](benchmark.md), with 95 % intervals.\n"]
    for row, format_name in places_of(lines, profile):
        text.append(f"## {row}, {format_name}\n\n{detail_table(lines, row, format_name)}\n")
    (docs_dir / "benchmark-models.md").write_text("\n".join(text), encoding="utf-8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--results-dir", type=Path, default=Path(), help="where the *-results folders are")
    parser.add_argument("--docs-dir", type=Path, default=DOCS_DIR)
    args = parser.parse_args()
    folders = {name: args.results_dir / f"{name}-results" for name in ("full", *PARTS)}
    report, profile = load(folders["full"])
    lines = summarize(report.cells)
    places = places_of(lines, profile)
    measured = {line.defense for line in lines}
    defenses = [entry.name for entry in profile.defenses if entry.name in measured]
    present = {name: folder for name, folder in folders.items() if folder.is_dir()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False
    )
    head, clean = clean_rows(lines, places, defenses)
    common = common_places(lines, places, defenses)
    promised = [e.restored.defense for e in profile.expect if e.restored is not None and e.restored.defense in measured]
    page = environment.get_template("benchmark_page.md.j2").render(
        runs=[{"name": name, "folder": folder.name} for name, folder in present.items()],
        full=facts(report, profile),
        matrix=markdown(*asr_rows(lines, places, defenses)),
        methods=markdown(*method_rows(lines, groups_of(places, profile), defenses)),
        common=", ".join(f"{row} ({fmt})" for row, fmt in common),
        common_methods=markdown(*method_rows(lines, groups_of(common, profile), defenses)),
        figures=draw(report, profile, args.docs_dir),
        clean_table=markdown(head, clean) if clean else "",
        promised=promised,
        utility=markdown(*utility_rows(lines, places, promised)),
        utility_counts=[utility_text(lines, places, name) for name in promised],
        attackers=markdown(*attacker_rows(lines, places)),
        checks="\n\n".join(checks_text(report)),
        reading=(HERE / "benchmark_reading.md").read_text(encoding="utf-8").strip(),
        parts=[part(name, present[name], args.docs_dir) for name in PARTS if name in present],
    )
    (args.docs_dir / "benchmark.md").write_text(page.rstrip() + "\n", encoding="utf-8")
    write_models(report, profile, args.docs_dir)


if __name__ == "__main__":
    main()
