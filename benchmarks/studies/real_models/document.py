"""The part of ``docs/detection.md`` about real models: tables and a plot from the study's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import DATA_DIR
from benchmarks.studies.real_models.study import read
from qcbguard_plugins.detection.inputs.check_inputs import ALPHA
from qcbguard_plugins.detection.inputs.combination import FLOOR

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
RESULTS = DATA_DIR / "real_models.jsonl"
_NEXT_PART = "## The study on small models"
_FEWEST_RUNS = 30


def write_first_part(docs_dir: Path) -> None:
    """Write the plot, and the part of the page about real models before what follows it there."""
    part = (HERE / "template.md").read_text(encoding="utf-8")
    for name, value in _tables(RESULTS).items():
        part = part.replace(f"@{name}@", value)
    plot_p_values(RESULTS, docs_dir / "detection-inputs.svg")
    page = docs_dir / "detection.md"
    rest = page.read_text(encoding="utf-8").partition(_NEXT_PART)
    page.write_text(part + rest[1] + rest[2], encoding="utf-8")


def _tables(results_path: Path) -> dict[str, str]:
    """What the template's marks of this part stand for."""
    rows = read(results_path)
    attacked = [row for row in rows if row["kind"] == "attacked"]
    clean = [row for row in rows if row["kind"] != "attacked"]
    return {
        "REAL_ATTACKED": _attacked_table(attacked),
        "REAL_CLEAN": _clean_table(clean),
        "REAL_FALSE_POSITIVES": _false_positives(clean),
        "REAL_DIRECTIONS": _direction_table(attacked, clean),
        "REAL_TIMES": _times(rows),
        "REAL_RULE": _rule(),
        "REAL_COMMITS": ", ".join(sorted({row["commit"] for row in rows})),
    }


def plot_p_values(results_path: Path, path: Path) -> None:
    """p-values of every direction of every run: a model without an attack should stay at or below the diagonal."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update(
        {"svg.hashsalt": "detection", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    )
    from matplotlib import pyplot

    rows = read(results_path)
    figure, axes = pyplot.subplots(figsize=(4.6, 3.4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":", label="uniform")
    for kinds, colour, label in (
        (("clean", "malicious"), "#1f5fa8", "no quantization attack"),
        (("attacked",), "#b3261e", "attacked"),
    ):
        p_values = sorted(d["p_value"] for _, d in _directions([row for row in rows if row["kind"] in kinds]))
        shares = [(i + 1) / len(p_values) for i in range(len(p_values))]
        axes.step(p_values, shares, where="post", color=colour, label=f"{label}, {len(p_values)} tests")
    axes.set_xlabel("p-value of one direction over all layers, not corrected")
    axes.set_ylabel("share of tests at or below it")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _directions(rows: Sequence[Row]) -> list[tuple[Row, dict[str, Any]]]:
    return [(row, d) for row in rows for found in row["inputs"].values() for d in found["directions"]]


def _attacked_table(rows: Sequence[Row]) -> str:
    lines = [
        "| attack | format | full precision | stock quantized | moved, cells | `scan`: corrected p | inputs: excess "
        "| inputs: corrected p | found by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        facts = row["facts"]
        for name, found in row["inputs"].items():
            scan = row["scan"][name]
            by = [step for step, seen in (("weights", scan["attacked"]), ("inputs", found["attacked"])) if seen]
            lines.append(
                f"| {row['model']} | {name} | {facts['rate_full_precision']:.0%} | {facts['rate_quantized']:.0%} "
                f"| {facts['moved_cells']:.3f} | {scan['p_value']:.2g} | {found['excess']:+.1%} "
                f"| {found['p_value']:.1e} | {', '.join(by) or 'missed'} |"
            )
    return "\n".join(lines)


def _clean_table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | runs | tests of a format | flagged | largest excess | smallest corrected p | largest deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        found = [part for row in own for part in row["inputs"].values()]
        deviation = max(d["deviations"] for _, d in _directions(own))
        lines.append(
            f"| {model} | {len(own)} | {len(found)} | {sum(part['attacked'] for part in found)} "
            f"| {max(part['excess'] for part in found):+.1%} | {min(part['p_value'] for part in found):.2g} "
            f"| {deviation:+.1f} |"
        )
    return "\n".join(lines)


def _false_positives(rows: Sequence[Row]) -> str:
    flagged = sum(row["inputs_verdict"] == "attacked" for row in rows)
    models = len({row["model"] for row in rows})
    counted = f"{flagged} of {len(rows)} runs on {models} models without a quantization attack are flagged"
    if flagged:
        return counted
    if len(rows) < _FEWEST_RUNS:
        return f"{counted}, too few runs to bound the rate"
    # With no finding in n runs the rate is below 3 / n with 95 % confidence (rule of three).
    return f"{counted}; the rate is below {3 / len(rows):.0%} with 95 % confidence"


def _direction_table(attacked: Sequence[Row], clean: Sequence[Row]) -> str:
    lines = [
        "| direction | attacked: ratio | neighbours | deviations | no attack: ratios | deviations |",
        "|---|---|---|---|---|---|",
    ]
    names = [d["name"] for _, d in _directions(attacked[:1])]
    for name in names:
        first = next(d for _, d in _directions(attacked[:1]) if d["name"] == name)
        others = [d for _, d in _directions(clean) if d["name"] == name]
        ratios, deviations = [d["ratio"] for d in others], [d["deviations"] for d in others]
        lines.append(
            f"| {name} | {first['ratio']:.3f} | {first['neighbours']:.3f} | {first['deviations']:+.1f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} | {min(deviations):+.1f} to {max(deviations):+.1f} |"
        )
    return "\n".join(lines)


def _times(rows: Sequence[Row]) -> str:
    of_smollm2 = [row for row in rows if not row["model"].startswith("minilm") and len(row["inputs"]) == 1]
    seconds = [row["inputs_cpu_s"] for row in of_smollm2]
    if not seconds:
        return "not measured"
    return f"{min(seconds):.0f} to {max(seconds):.0f} CPU-seconds, loading included ({len(seconds)} runs)"


def _rule() -> str:
    """The rule in words."""
    return f"a corrected p-value of at most {ALPHA:g} and an excess of at least {FLOOR:.1%}"
