"""What the recipes share: guard a folder, hand it to the tool, count the codes that it stores as planned."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from qcbguard_plugins import guard_checkpoint
from qcbguard_plugins.backends.formats import get_grid
from qcbguard_plugins.checkpoint import open_checkpoint

LEAST_SHARE = 0.99

Quantized = tuple[nn.Module, dict[str, Tensor]]
"""A tool's model, and by layer name the codes that it stores: integers ``[out_features, in_features]`` from 0."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that all these tools quantize: every linear one but the output head."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def share_as_planned(guarded: Path, format_name: str, stored: dict[str, Tensor]) -> float:
    """The share of a tool's codes that are those of the folder that was guarded for the format."""
    checkpoint, grid = open_checkpoint(guarded), get_grid(format_name)
    equal = total = 0
    for name, codes in stored.items():
        planned = grid.quantize(checkpoint.read(f"{name}.weight"))
        equal += int((codes == planned).sum())
        total += planned.numel()
    return equal / total


def run(tool: str, format_name: str, quantize: Callable[[Path], Quantized]) -> NoReturn:
    """Guard the folder named on the command line, quantize it, and exit with 1 if too few codes are those planned.

    Args:
        tool: Its name, for the outcome.
        format_name: The format to guard for.
        quantize: Quantizes a folder with the tool.
    """
    parser = argparse.ArgumentParser(description=f"Guard a model for {tool}, quantize it, compare.")
    parser.add_argument("model", type=Path, help="folder of a model in full precision")
    parser.add_argument("method", nargs="?", default="feedback", help="how to guard it (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        guarded = Path(folder) / "guarded"
        guard_checkpoint(args.model, guarded, [format_name], args.method)
        _, stored = quantize(guarded)
        share = share_as_planned(guarded, format_name, stored)
    print(f"{tool} stores {share:.3%} of the codes as planned")
    sys.exit(0 if share >= LEAST_SHARE else 1)
