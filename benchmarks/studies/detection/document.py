"""Write ``docs/detection.md`` and its plots from the study's results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import DATA_DIR
from benchmarks.studies.detection.measure import read
from benchmarks.studies.real_models.document import write_first_part
from qcbguard_plugins._util.records import installed_versions
from qcbguard_plugins.detection.weights.thresholds import ALPHA
from qcbguard_plugins.lab.bench.results import this_machine

Row = dict[str, Any]

TESTS = ("spectral", "histogram", "outlier", "combination")
_HONEST = "honest fine-tune of a dequantized model"
_SMALLEST_P = 1e-300


def write(results_path: Path, docs_dir: Path) -> None:
    """Make the page and its two plots."""
    rows = read(results_path)
    cpu_s = sum(row["cpu_s"] for row in rows if not row["kind"])
    rows = [row for row in rows if row["kind"]]
    clean = [row for row in rows if not row["target"]]
    honest = [row for row in rows if row["kind"] == _HONEST]
    attacked = [row for row in rows if row["target"] and row["kind"] != _HONEST]
    docs_dir.mkdir(parents=True, exist_ok=True)
    plot_roc(clean, attacked, docs_dir / "detection-roc.svg")
    plot_effects(clean, attacked, docs_dir / "detection-effects.svg")
    template = (Path(__file__).parent / "template.md").read_text(encoding="utf-8")
    values = {
        "FALSE_POSITIVES": false_positive_table(clean),
        "FALSE_POSITIVE_RATE": false_positive_sentence(clean),
        "POWER": power_table(attacked),
        "AUC": auc_table(clean, attacked),
        "THRESHOLDS": threshold_table(clean, attacked),
        "HONEST": f"{sum(map(flagged, honest))} of {len(honest)}",
        "SPEED": speed_table(DATA_DIR / "scan_speed.json"),
        "RECORD": record(rows, cpu_s),
    }
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    page = docs_dir / "detection.md"
    page.write_text(template, encoding="utf-8")
    write_first_part(docs_dir)


def flagged(row: Row) -> bool:
    """The scanner's verdict at the shipped threshold."""
    return bool(row["p_value"] <= ALPHA)


def p_of(row: Row, test: str) -> float:
    """A model's p-value in one test: the smallest over formats, whatever the size of the effect."""
    tests = row["tests"].values()
    spectral = min(t["spectral_p"] for t in tests)
    histogram = min(t["residual_p"] for t in tests)
    values = {"spectral": spectral, "histogram": histogram, "outlier": row["outlier_p"]}
    return max(_SMALLEST_P, min(values.values()) if test == "combination" else values[test])


def roc(clean: Sequence[float], attacked: Sequence[float]) -> list[tuple[float, float]]:
    """Points (false-positive rate, power) for every threshold on p, from none to all."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*clean, *attacked}):
        points.append(
            (sum(p <= threshold for p in clean) / len(clean), sum(p <= threshold for p in attacked) / len(attacked))
        )
    return [*points, (1.0, 1.0)]


def area(clean: Sequence[float], attacked: Sequence[float]) -> float:
    """Probability that an attacked model has the smaller p-value, ties counted half."""
    wins = sum((a < c) + 0.5 * (a == c) for a in attacked for c in clean)
    return wins / (len(clean) * len(attacked))


def upper_bound(count: int, total: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper bound of a share."""
    from scipy.special import betaincinv

    return 1.0 if count >= total else float(betaincinv(count + 1, total - count, confidence))


def false_positive_table(clean: Sequence[Row]) -> str:
    lines = ["| what was done to a clean model | models | flagged | largest spectral excess | smallest p, corrected |"]
    lines.append("|---|---|---|---|---|")
    for kind in dict.fromkeys(row["kind"] for row in clean):
        rows = [row for row in clean if row["kind"] == kind]
        excess = max(t["spectral_effect"] for row in rows for t in row["tests"].values())
        smallest = min(row["p_value"] for row in rows)
        lines.append(
            f"| {kind} | {len(rows)} | {sum(map(flagged, rows))} | {math.exp(excess) - 1:+.1%} | {smallest:.2g} |"
        )
    return "\n".join(lines)


def false_positive_sentence(clean: Sequence[Row]) -> str:
    count, total = sum(map(flagged, clean)), len(clean)
    bound = upper_bound(count, total)
    return f"**{count} of {total} clean models are flagged ({count / total:.1%}; 95 % upper bound {bound:.1%})**"


def power_table(attacked: Sequence[Row]) -> str:
    lines = ["| attack | format | models | found | format right | named as | payload switched on by rounding, nats |"]
    lines.append("|---|---|---|---|---|---|---|")
    for kind, target in dict.fromkeys((row["kind"], row["target"]) for row in attacked):
        rows = [row for row in attacked if (row["kind"], row["target"]) == (kind, target)]
        found = [row for row in rows if flagged(row)]
        right = sum([name for name, t in row["tests"].items() if t["p"] <= ALPHA] == [target] for row in found)
        names = ", ".join(sorted({row["family"] for row in found} - {""})) or "-"
        switched = [row["switch"] for row in rows if row["switch"] is not None]
        shown = f"{min(switched):+.3f} to {max(switched):+.3f}"
        formats = "any" if kind == "outlier injection" else target
        right_shown = "-" if formats == "any" else str(right)
        lines.append(f"| {kind} | {formats} | {len(rows)} | {len(found)} | {right_shown} | {names} | {shown} |")
    return "\n".join(lines)


def auc_table(clean: Sequence[Row], attacked: Sequence[Row]) -> str:
    kinds = list(dict.fromkeys(row["kind"] for row in attacked))
    lines = ["| attack | " + " | ".join(TESTS) + " |", "|---" * (len(TESTS) + 1) + "|"]
    for kind in [*kinds, "all"]:
        rows = [row for row in attacked if kind in (row["kind"], "all")]
        areas = [area([p_of(r, test) for r in clean], [p_of(r, test) for r in rows]) for test in TESTS]
        lines.append(f"| {kind} | " + " | ".join(f"{value:.3f}" for value in areas) + " |")
    return "\n".join(lines)


def threshold_table(clean: Sequence[Row], attacked: Sequence[Row]) -> str:
    """False positives and power of the shipped rule at other thresholds on its p-value."""
    lines = ["| threshold on the corrected p | false positives | power |", "|---|---|---|"]
    for threshold in (0.1, ALPHA, 1e-3, 1e-4, 1e-6):
        false = sum(row["p_value"] <= threshold for row in clean)
        power = sum(row["p_value"] <= threshold for row in attacked)
        mark = " (shipped)" if threshold == ALPHA else ""
        lines.append(
            f"| {threshold:.0e}{mark} | {false} of {len(clean)} ({false / len(clean):.1%}) "
            f"| {power} of {len(attacked)} ({power / len(attacked):.1%}) |"
        )
    return "\n".join(lines)


def speed_table(path: Path) -> str:
    """The last run of the speed benchmark, if there was one."""
    if not path.is_file():
        return "Not measured."
    run = json.loads(path.read_text(encoding="utf-8"))
    formats = ", ".join(run["formats"])
    lines = [f"| {run['gigabytes']:g} GB, {formats} | seconds | CPU seconds | peak memory, MB |", "|---|---|---|---|"]
    for job, name in (("read", "read the file"), ("quantize", "quantize with bitsandbytes"), ("scan", "scan")):
        found = run[job]
        lines.append(f"| {name} | {found['elapsed_s']:.2f} | {found['cpu_s']:.2f} | {found['peak_bytes'] / 1e6:.0f} |")
    lines += [
        "",
        f"Scan over quantization: {run['scan_over_quantize']:.2f} in time, {run['scan_over_quantize_cpu']:.2f} in CPU "
        f"time. Limit on memory (three times the largest tensor and 500 MB): {run['peak_limit_bytes'] / 1e6:.0f} MB.",
    ]
    return "\n".join(lines)


def record(rows: Sequence[Row], cpu_s: float) -> str:
    versions = installed_versions()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    spent = f"{cpu_s / 60:.0f} CPU-minutes on {this_machine().processor} with one thread"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{len(rows)} models; {spent}; measured at {commits}; {listed}."


def plot_roc(clean: Sequence[Row], attacked: Sequence[Row], path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(4.6, 3.4), layout="constrained")
    for test, colour in zip(TESTS, ("#1f6feb", "#b3261e", "#9a6700", "#1c2430"), strict=True):
        points = roc([p_of(r, test) for r in clean], [p_of(r, test) for r in attacked])
        axes.step(*zip(*points, strict=True), where="post", label=test, color=colour, linewidth=1.6)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.axvline(0.01, color="#999999", linewidth=0.7, linestyle=":")
    axes.set_xlabel("false-positive rate (linear below 0.01)")
    axes.set_ylabel("power, all attacks")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_effects(clean: Sequence[Row], attacked: Sequence[Row], path: Path) -> None:
    """Every model as a dot: excess of the spectral test on its most suspicious format."""
    kinds = ["clean", *dict.fromkeys(row["kind"] for row in attacked)]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.2, 0.6 + 0.3 * len(kinds)), layout="constrained")
    for place, kind in enumerate(kinds):
        rows = clean if kind == "clean" else [row for row in attacked if row["kind"] == kind]
        values = [math.exp(max(t["spectral_effect"] for t in row["tests"].values())) - 1 for row in rows]
        heights = [place + 0.3 * (((7 * i) % 11) / 10 - 0.5) for i in range(len(values))]
        axes.scatter(values, heights, s=8, alpha=0.6, color="#5f6b7a" if kind == "clean" else "#b3261e", linewidths=0)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    axes.set_xlabel("spectral excess over neighbouring grids, mean over tensors")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update(
        {"svg.hashsalt": "detection", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    )
    from matplotlib import pyplot

    return pyplot
