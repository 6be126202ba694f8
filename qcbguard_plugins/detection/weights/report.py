"""The report of a scan."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from qcbguard_plugins._util.records import Record, Report

SCAN_SCHEMA_VERSION: Final = 1

Verdict = Literal["clean", "attacked", "incomplete"]


class TensorEvidence(Record):
    """One tensor on one format.

    Attributes:
        name: Its name in the file.
        format: The format.
        on_grid: True where the quantizer gives the stored weights back, so that there is nothing to test.
        spectral_effect: Largest singular value of the rounding error over that on neighbouring grids, less one.
        spectral_p: p-value of it, corrected for the number of tensors.
        residual_effect: Distance of the histogram of places in cells over that of neighbouring grids, log units.
        residual_p: p-value of it, corrected for the number of tensors.
    """

    name: str
    format: str
    on_grid: bool
    spectral_effect: float
    spectral_p: float = Field(ge=0, le=1)
    residual_effect: float
    residual_p: float = Field(ge=0, le=1)


class ScannedTensor(Record):
    """One tensor, whatever the format.

    Attributes:
        name: Its name in the file.
        layer: Number of its layer, or ``None``.
        projection: What it is within its layer.
        shape: ``[out_features, in_features]``.
        dtype: Its dtype.
        num_weights: Its size.
        num_tested: Size of the random part that was tested.
        outlier_share: Share of its chunks that are ruled by one weight.
        outlier_p: p-value of that share against shuffled rows.
        layer_distance: Kolmogorov-Smirnov distance of its chunk ratios from those of its kind in other layers.
    """

    name: str
    layer: int | None
    projection: str
    shape: tuple[int, int]
    dtype: str
    num_weights: int
    num_tested: int
    outlier_share: float
    outlier_p: float
    layer_distance: float


class TestEvidence(Record):
    """One test over all tensors.

    Attributes:
        effect: Mean over tensors of the log of the statistic over that on neighbouring grids.
        raw_p_value: p-value, corrected for the number of tensors, whatever the size of the effect.
        p_value: The same, but 1 where the effect is too small to matter.
    """

    __test__ = False  # keeps pytest from collecting it

    effect: float
    raw_p_value: float = Field(ge=0, le=1)
    p_value: float = Field(ge=0, le=1)


class FormatEvidence(Record):
    """All tensors on one format.

    Attributes:
        format: The format.
        attacked: Whether its corrected p-value is a finding.
        p_value: The smallest p-value of its tests, corrected for the number of tests and formats.
        spectral: The spectral test.
        residual: The histogram test.
        num_on_grid: Number of tensors that lie on the format's grid already.
        histogram: Shares of the weights over 32 equal bins of their place in their cells.
        expected_histogram: The same on neighbouring grids.
        boundary_density: Density near the boundary between two codes over the expected one.
        peak_margin: Distance from that boundary at which weights pile up most, in steps.
    """

    format: str
    attacked: bool
    p_value: float = Field(ge=0, le=1)
    spectral: TestEvidence
    residual: TestEvidence
    num_on_grid: int
    histogram: tuple[float, ...]
    expected_histogram: tuple[float, ...]
    boundary_density: float
    peak_margin: float


class SkippedTensor(Record):
    """A tensor that a quantizer would round and that could not be tested."""

    name: str
    reason: str


class UntestedFile(Record):
    """A file beside the tested ones that holds weights too.

    Attributes:
        name: Its path in the folder.
        taken_by: What takes it instead of the tested ones.
    """

    name: str
    taken_by: str


class ScanReport(Report):
    """What a scan found out.

    Attributes:
        verdict: ``attacked``: a finding; ``clean``: every target was tested and none stands out; ``incomplete``:
            nothing stands out, but not every target could be tested, or other files of the folder hold weights too.
        p_value: The smallest corrected p-value of all tests.
        likely_formats: Formats that carry a finding, most evident first.
        family: Name of the attack family, or an empty string.
        meaning: What that family is.
        outlier_p: p-value of the outlier test, corrected for tensors, tests and formats.
        seed: Seed of the random rows and neighbouring grids.
        untested_files: Weight files of the folder that some loaders can be told to take, and that were not tested.
    """

    schema_version: Literal[1] = SCAN_SCHEMA_VERSION
    kind: Literal["scan"] = "scan"
    model: str
    file_kind: str
    verdict: Verdict
    p_value: float = Field(ge=0, le=1)
    alpha: float
    likely_formats: tuple[str, ...]
    family: str
    meaning: str
    outlier_p: float = Field(ge=0, le=1)
    seed: int
    formats: tuple[FormatEvidence, ...]
    tensors: tuple[ScannedTensor, ...]
    evidence: tuple[TensorEvidence, ...]
    skipped: tuple[SkippedTensor, ...]
    num_others: int
    untested_files: tuple[UntestedFile, ...] = ()
    elapsed_s: float = Field(ge=0)

    @property
    def num_targets(self) -> int:
        return len(self.tensors) + len(self.skipped)

    @property
    def coverage(self) -> str:
        tested = sum(tensor.num_tested for tensor in self.tensors)
        total = sum(tensor.num_weights for tensor in self.tensors)
        share = "" if tested == total else f", {tested / total:.0%} of their weights sampled"
        return f"{len(self.tensors)} of {self.num_targets} target tensors tested{share}"

    @property
    def exit_code(self) -> int:
        return {"clean": 0, "attacked": 1, "incomplete": 3}[self.verdict]
