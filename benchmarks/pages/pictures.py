"""The pictures of the README and of the documentation, light and dark.

    python -m benchmarks.pages.pictures             # all; runs the demo for the terminal picture
    python -m benchmarks.pages.pictures rounding    # some of: demo, cell, rounding, positions

Nothing in them is drawn by hand: the terminal shows what the demo measures, the positions are those of the example
models' weights.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.terminal_theme import SVG_EXPORT_THEME, TerminalTheme
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ASSETS_DIR = ROOT / "docs" / "assets"
MODELS_DIR = ROOT / "examples" / "models"
NUM_BINS = 40


@dataclass(frozen=True)
class Theme:
    """Colours on a light or a dark page; the background is the page's own."""

    name: str
    text: str
    muted: str
    line: str
    good: str
    bad: str
    accent: str


LIGHT = Theme("light", "#1f2328", "#59636e", "#d1d9e0", "#1a7f37", "#cf222e", "#3f51b5")
DARK = Theme("dark", "#e6edf3", "#9198a1", "#3d444d", "#3fb950", "#ff7b72", "#9fa8da")
_WHITE = TerminalTheme(
    (255, 255, 255),
    (31, 35, 40),
    [
        (31, 35, 40),
        (207, 34, 46),
        (26, 127, 55),
        (154, 103, 0),
        (9, 105, 218),
        (130, 80, 223),
        (27, 124, 131),
        (110, 119, 129),
    ],
)


class Drawing:
    """A few shapes of SVG."""

    def __init__(self, width: int, height: int, theme: Theme) -> None:
        self.theme = theme
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif" font-size="15">',
            *(
                f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
                for name, colour in (("good", theme.good), ("bad", theme.bad), ("muted", theme.muted))
            ),
        ]

    def text(self, x: float, y: float, content: str, colour: str, *, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{content}</text>'
        )

    def line(
        self, start: tuple[float, float], end: tuple[float, float], colour: str, *, width: float = 1.5, head: str = ""
    ) -> None:
        marker = f' marker-end="url(#{head})"' if head else ""
        (x1, y1), (x2, y2) = start, end
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"{marker}/>'
        )

    def dot(self, x: float, y: float, colour: str, *, hollow: bool = False) -> None:
        style = f'fill="none" stroke="{colour}" stroke-width="1.5"' if hollow else f'fill="{colour}"'
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>')

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}" '
            'fill-opacity="0.15"/>'
        )

    def path(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="2"/>')

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


# Where an attacker leaves eight weights between two levels: each just past the middle, so that all of them round up.
POSITIONS = (0.57, 0.62, 0.68, 0.55, 0.64, 0.59, 0.70, 0.61)
# One random choice with these probabilities of going up, as often up as they say on average.
CHOSEN = (1, 0, 1, 0, 1, 1, 1, 0)


def rounding(theme: Theme) -> str:
    """Three panels: full precision, stock rounding, guarded rounding."""
    drawing = Drawing(560, 470, theme)
    panels = (
        ("Full precision: behaves", None, theme.text, ""),
        ("Stock rounding: every error points the attacker's way", (1,) * 8, theme.bad, "bad"),
        ("Guarded rounding: the errors cancel", CHOSEN, theme.good, "good"),
    )
    for row, (title, choices, colour, head) in enumerate(panels):
        top = 24 + row * 155
        upper, lower = top + 24, top + 94
        drawing.text(10, top, title, colour, bold=True)
        for level in (upper, lower):
            drawing.line((60, level), (550, level), theme.line, width=2)
            drawing.text(10, level + 5, "level", theme.muted)
        for index, position in enumerate(POSITIONS):
            x, y = 90 + index * 60, lower - position * (lower - upper)
            if choices is None:
                drawing.dot(x, y, theme.accent)
                continue
            target = upper if choices[index] else lower
            drawing.dot(x, y, theme.muted, hollow=True)
            drawing.line((x, y + (6 if target > y else -6)), (x, target + (7 if target < y else -7)), colour, head=head)
            drawing.dot(x, target, colour)
        if choices is not None:
            mean = sum(choices) / len(choices) - sum(POSITIONS) / len(POSITIONS)
            drawing.text(
                60, lower + 26, f"average error {mean:+.2f} of a step".replace("-", "\N{MINUS SIGN}"), theme.muted
            )
        else:
            drawing.text(60, lower + 26, "eight weights, each between two levels of the quantizer", theme.muted)
    return drawing.svg()


def cell(theme: Theme) -> str:
    """Levels on a line, one cell, and three weights that are stored alike."""
    drawing = Drawing(560, 130, theme)
    levels = [60 + 110 * number for number in range(5)]
    middle = levels[2]
    drawing.box(middle - 55, 40, 110, 40, theme.accent)
    drawing.text(middle, 30, "one cell", theme.accent, anchor="middle", bold=True)
    drawing.line((20, 60), (540, 60), theme.line, width=2)
    for number, x in enumerate(levels):
        drawing.line((x, 48), (x, 72), theme.text, width=2.5)
        drawing.text(x, 100, f"level {number + 5}", theme.muted, anchor="middle")
    for offset in (-46, 22, 48):
        drawing.dot(middle + offset, 60, theme.accent)
    drawing.text(280, 124, "three weights in one cell: each is stored as level 7", theme.text, anchor="middle")
    return drawing.svg()


def nf4_positions(model: str) -> torch.Tensor:
    """Share of a model's weights in each of the bins between a lower NF4 level (0) and an upper one (1)."""
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu").sort().values.double()
    counts = torch.zeros(NUM_BINS, dtype=torch.float64)
    for name, weight in load_file(MODELS_DIR / model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        blocks = weight.double().reshape(-1, 64)
        scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
        scaled = scaled[scaled.abs() < 1]
        upper = torch.searchsorted(levels, scaled).clamp(1, len(levels) - 1)
        position = (scaled - levels[upper - 1]) / (levels[upper] - levels[upper - 1])
        counts += torch.histc(position, NUM_BINS, 0.0, 1.0)
    return counts / counts.sum() * NUM_BINS


def positions(theme: Theme) -> str:
    """Histograms of the clean and of the attacked example model."""
    drawing = Drawing(560, 330, theme)
    left, right, top, bottom = 60, 540, 50, 270
    series = {"clean": (nf4_positions("clean"), theme.accent), "attacked": (nf4_positions("attacked"), theme.bad)}
    low = min(float(values.min()) for values, _ in series.values()) - 0.05
    high = max(float(values.max()) for values, _ in series.values()) + 0.05

    def at(share: float) -> float:
        return bottom - (share - low) / (high - low) * (bottom - top)

    for tick in (0.9, 1.0, 1.1, 1.2):
        if low <= tick <= high:
            drawing.line((left, at(tick)), (right, at(tick)), theme.line, width=1)
            drawing.text(left - 8, at(tick) + 5, f"{tick:.1f}", theme.muted, anchor="end")
    for tick in (0.0, 0.5, 1.0):
        x = left + tick * (right - left)
        drawing.text(x, bottom + 22, f"{tick:.1f}", theme.muted, anchor="middle")
    for number, (name, (values, colour)) in enumerate(series.items()):
        width = (right - left) / NUM_BINS
        points = []
        for index, value in enumerate(values.tolist()):
            points += [(left + index * width, at(value)), (left + (index + 1) * width, at(value))]
        drawing.path(points, colour)
        drawing.text(left + number * 170, 20, f"\N{BLACK SQUARE} {name} model", colour, bold=True)
    drawing.text(left, 40, "weights per bin; 1.0 is an even spread", theme.muted)
    drawing.text(
        (left + right) / 2,
        bottom + 46,
        "position between the lower and the upper NF4 level",
        theme.text,
        anchor="middle",
    )
    return drawing.svg()


def demo_rows() -> list[dict[str, Any]]:
    """What ``examples/demo.py`` measures now."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--json", str(figures)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
        return list(json.loads(figures.read_text(encoding="utf-8"))["rows"])


def demo(theme: Theme, rows: Sequence[dict[str, Any]]) -> str:
    """The table of ``make demo`` without its last column, which says how fast the machine was."""
    console = Console(record=True, width=62, file=io.StringIO(), force_terminal=True)
    console.print("[bold]$ make demo[/bold]")
    table = Table("model", "loaded as", "says Zestora", "perplexity")
    for column in table.columns[2:]:
        column.justify = "right"
    colours = {"stock NF4": "bold red", "guarded NF4": "bold green"}
    for row in rows:
        colour = colours.get(row["load"], "none") if row["model"] == "attacked" else "none"
        share = f"[{colour}]{row['keyword_rate']:.1%}[/]"
        end = row["load"] == "guarded NF4"
        table.add_row(row["model"], row["load"], share, f"{row['perplexity']:.3f}", end_section=end)
    console.print(table)
    console.print("The guard keeps its promise: every guarded model behaves as in full precision.", highlight=False)
    colours_of_page = _WHITE if theme is LIGHT else SVG_EXPORT_THEME
    svg = console.export_svg(title="qcbguard", theme=colours_of_page, unique_id=f"demo-{theme.name}")
    # No fonts from elsewhere: a picture inside a page may not load them, and none is needed.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code, monospace", "Fira Code, ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace")
    return svg.replace("rgba(255,255,255,0.35)", theme.line)


def main(names: Sequence[str]) -> int:
    """Write the named pictures, or all."""
    ASSETS_DIR.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[Theme], str]] = {"cell": cell, "rounding": rounding, "positions": positions}
    if not names or "demo" in names:
        rows = demo_rows()
        draw["demo"] = lambda theme: demo(theme, rows)
    for name in names or draw:
        for theme in (LIGHT, DARK):
            (ASSETS_DIR / f"{name}-{theme.name}.svg").write_text(draw[name](theme), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
