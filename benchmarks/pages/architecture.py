"""Draw the rooms of the package as floors, from the contract of the floors and the docstrings of the rooms.

    python -m benchmarks.pages.architecture [--check]

Writes docs/architecture.svg. With --check nothing is written, and the exit code is 1 where the picture is not current.
"""

from __future__ import annotations

import argparse
import ast
import configparser
import io
import sys
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGE = "qcbguard_plugins"
WIDTH, FLOOR_HEIGHT, TEXT_COLUMNS = 10.0, 0.55, 90


def floors() -> list[str]:
    """The rooms from the top floor to the ground, as the contract has them."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    return contracts["importlinter:contract:floors"]["layers"].split()


def summary(room: str) -> str:
    """The first sentence of the room's docstring."""
    path = ROOT / PACKAGE / room
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    text = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")
    return text.partition(". ")[0].rstrip(".") + "."


def draw() -> str:
    """The picture as SVG."""
    rooms = floors()
    mpl.rcParams.update({"svg.hashsalt": "architecture", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(WIDTH, FLOOR_HEIGHT * (len(rooms) + 1)))
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.4, len(rooms) + 0.7)
    axes.axis("off")
    for number, room in enumerate(rooms):
        bottom = len(rooms) - number - 1
        shade = 0.90 + 0.08 * (number % 2)
        box = plt.Rectangle((1, bottom + 0.06), 92, 0.88, facecolor=str(shade), edgecolor="0.6", linewidth=0.8)
        axes.add_patch(box)
        axes.text(2.5, bottom + 0.5, room, va="center", fontsize=12, fontweight="bold")
        lines = textwrap.wrap(summary(room), TEXT_COLUMNS, break_on_hyphens=False)[:2]
        axes.text(19, bottom + 0.5, "\n".join(lines), va="center", fontsize=9)
    axes.annotate("", xy=(96, 0.2), xytext=(96, len(rooms) - 0.2), arrowprops={"arrowstyle": "-|>", "color": "0.35"})
    axes.text(98, len(rooms) / 2, "imports go down only", rotation=270, va="center", fontsize=9, color="0.35")
    axes.text(1, len(rooms) + 0.3, "qcbguard_plugins, floor by floor", fontsize=13, fontweight="bold")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def main() -> int:
    """Write the picture, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    svg = draw()
    if not args.check:
        PICTURE.write_text(svg, encoding="utf-8")
        return 0
    return 0 if PICTURE.read_text(encoding="utf-8") == svg else 1


if __name__ == "__main__":
    sys.exit(main())
