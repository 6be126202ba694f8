"""The report of the input test."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from qcbguard_plugins._util.records import Record, Report

INPUT_SCHEMA_VERSION: Final = 1


class DirectionEvidence(Record):
    """One direction on one format.

    Attributes:
        name: The direction, such as ``answer start``.
        ratio: Energy of the rounding errors along it over that of random signs, mean over layers.
        neighbours: The same on neighbouring grids.
        deviations: Distance from the nearer null, in standard deviations.
        p_value: p-value over all layers, not corrected.
        block: Number of the block that stands out most, or ``None``.
        block_ratio: Its ratio.
        block_p: Its p-value, corrected for the number of blocks.
    """

    name: str
    ratio: float
    neighbours: float
    deviations: float
    p_value: float = Field(ge=0, le=1)
    block: int | None
    block_ratio: float
    block_p: float = Field(ge=0, le=1)


class FormatInputs(Record):
    """All directions on one format.

    Attributes:
        format: The format.
        attacked: Whether its p-value is a finding.
        p_value: The smallest p-value of its directions, corrected for their number and that of the formats.
        excess: Excess of the strongest direction over the stricter null, as a share.
        direction: That direction.
        smallest_visible: Excess that would have been a finding, as a share: what the test can see at this size.
        num_layers: Layers that were tested.
        num_on_grid: Layers that lie on the format's grid already, where nothing can be hidden.
        directions: Evidence of each direction.
    """

    format: str
    attacked: bool
    p_value: float = Field(ge=0, le=1)
    excess: float
    direction: str
    smallest_visible: float
    num_layers: int
    num_on_grid: int
    directions: tuple[DirectionEvidence, ...]


class UntestedLayer(Record):
    """A layer that a quantizer would round and that could not be tested."""

    name: str
    reason: str


class InputReport(Report):
    """What the layers' inputs tell about the rounding errors.

    Attributes:
        verdict: ``attacked``: a finding; ``clean``: every layer was tested on its inputs and nothing stands out;
            ``incomplete``: nothing stands out, but not every layer could be tested.
        p_value: The smallest corrected p-value.
        seed: Seed of the neighbouring grids and the random rows.
        own_prompts: Whether prompts of the user's were read as well.
        num_texts: Texts that were read.
        num_tokens: Their tokens.
    """

    schema_version: Literal[1] = INPUT_SCHEMA_VERSION
    kind: Literal["inputs"] = "inputs"
    model: str
    verdict: Literal["clean", "attacked", "incomplete"]
    p_value: float = Field(ge=0, le=1)
    alpha: float
    seed: int
    own_prompts: bool
    num_texts: int
    num_tokens: int
    formats: tuple[FormatInputs, ...]
    skipped: tuple[UntestedLayer, ...]
    elapsed_s: float = Field(ge=0)

    @property
    def coverage(self) -> str:
        tested = max(found.num_layers + found.num_on_grid for found in self.formats)
        total = tested + len(self.skipped)
        return f"{tested} of {total} layers tested on {self.num_texts} texts, {self.num_tokens} tokens"

    @property
    def exit_code(self) -> int:
        return {"clean": 0, "attacked": 1, "incomplete": 3}[self.verdict]
