"""Tensors of a checkpoint that some quantizer would take and that a run does not guard, for reports."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from qcbguard_plugins._util.records import Record


class UncoveredTensor(Record):
    """One such tensor.

    Attributes:
        key: Its name in the checkpoint.
        shape: Its shape there.
        num_weights: Number of weights.
        num_bytes: Its size in the checkpoint.
        reason: Why it is not guarded, and who would quantize it.
    """

    key: str
    shape: tuple[int, ...]
    num_weights: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    reason: str


def describe_uncovered(uncovered: Sequence[UncoveredTensor]) -> list[str]:
    """A line for each reason, with the number of tensors, weights and bytes; empty where all is covered."""
    lines = []
    for reason in dict.fromkeys(tensor.reason for tensor in uncovered):
        of_reason = [tensor for tensor in uncovered if tensor.reason == reason]
        num_weights = sum(tensor.num_weights for tensor in of_reason)
        megabytes = sum(tensor.num_bytes for tensor in of_reason) / 1e6
        lines.append(f"{len(of_reason)} tensors ({num_weights:,} weights, {megabytes:,.1f} MB) not covered: {reason}")
    return lines
